"""Clients that keep a server busy with prompts of mixed lengths, and check every token of every answer."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import requests

from sglang_dwdp.demo.server import Server
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS

RIGHT, WRONG, RETRY = "right", "wrong", "503"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got.

    Attributes:
        what: RIGHT, WRONG, RETRY, or the error.
        started: When it was asked for, by `time.monotonic`.
        seconds: How long it took.
        rank: Which one answered; -1 where none did.
    """

    what: str
    started: float
    seconds: float
    rank: int = -1


class Load:
    """Clients in threads, each with one request at a time, until the context ends.

    Every other request is a stream; `abort_share` of those are left by their client after the first tokens.
    """

    def __init__(
        self,
        server: Server,
        expected: Sequence[list[int]],
        *,
        prompts: Sequence[str] = PROMPTS,
        new_tokens: int = MAX_NEW_TOKENS,
        clients: int = 8,
        abort_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._server, self._expected, self._prompts, self._abort_share = server, expected, prompts, abort_share
        self._new_tokens = new_tokens
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._seeds = [seed * clients + client for client in range(clients)]
        self.answers: list[Answer] = []

    def __enter__(self) -> Load:
        self._clients = [self._pool.submit(self._client, random.Random(seed)) for seed in self._seeds]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def between(self, first: float, last: float = float("inf")) -> list[Answer]:
        """The answers that were asked for in a span of `time.monotonic`."""
        return [answer for answer in self.answers if first <= answer.started < last]

    def _client(self, choices: random.Random) -> None:
        while not self._over.is_set():
            number = choices.randrange(len(self._prompts))
            started = time.monotonic()
            if choices.random() < 0.5:
                what, rank = self._unary(number)
            else:
                what, rank = self._stream(number, leave=choices.random() < self._abort_share)
            self.answers.append(Answer(what, started, time.monotonic() - started, rank))

    def _body(self, number: int) -> dict[str, object]:
        sampling = {"temperature": 0, "max_new_tokens": self._new_tokens}
        return {"text": self._prompts[number], "sampling_params": sampling}

    def _unary(self, number: int) -> tuple[str, int]:
        answer = requests.post(f"{self._server.url}/generate", json=self._body(number), timeout=120)
        if answer.status_code != 200:
            return str(answer.status_code), -1
        return self._judge(number, answer.json())

    def _stream(self, number: int, *, leave: bool) -> tuple[str, int]:
        body = {**self._body(number), "stream": True}
        last = b""
        with requests.post(f"{self._server.url}/generate", json=body, stream=True, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    last = line.removeprefix(b"data: ")
                    if leave:
                        return RIGHT, -1
        return self._judge(number, requests.models.complexjson.loads(last))

    def _judge(self, number: int, body: dict[str, object]) -> tuple[str, int]:
        if "error" in body:
            return str(body["error"]), -1
        meta = body["meta_info"]
        assert isinstance(meta, dict)
        if meta["finish_reason"]["type"] == "abort":
            return str(meta["finish_reason"].get("status_code")), -1
        rank = meta.get("dp_rank")
        return RIGHT if body["output_ids"] == self._expected[number] else WRONG, -1 if rank is None else rank


def rank_process(server: Server, rank: int) -> psutil.Process:
    """The scheduler process of a rank."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    [found] = [child for child in children if child.name().endswith(f"TP{rank}")]
    return found


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds.

    Attributes:
        descriptors: Open files and sockets.
        mappings: Of memory that ranks share.
        shared_bytes: Their size.
    """

    descriptors: int
    mappings: int
    shared_bytes: int

    @classmethod
    def by(cls, pid: int) -> Held:
        """What the process `pid` holds now."""
        with open(f"/proc/{pid}/maps") as maps:
            spans = [line.split()[0].split("-") for line in maps if "memfd:sglang-dwdp" in line]
        sizes = [int(end, 16) - int(start, 16) for start, end in spans]
        return cls(len(os.listdir(f"/proc/{pid}/fd")), len(sizes), sum(sizes))
