"""One SGLang engine in a process of its own: what its process runs, and how the parent talks to it.

The process is `python -m benchmarks.engine SPEC.json DESCRIPTOR`; the two ends exchange pickled objects over a pipe.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.processes import Process, RunError, reason, with_repository
from sglang_dwdp.demo.server import rank_of

# Engines that start at the same time draw the same ports, so each has a range of its own, below those that systems
# hand out. Of two programs that start engines at the same time, one is given another first port.
FIRST_PORT, PORTS = int(os.environ.get("DWDP_ENGINES_FIRST_PORT") or 11000), 500
ANSWER_S = 300.0  # longest time for one request; the first may compile kernels
_POLL_S, _LAST_WORDS_S = 0.5, 10.0

Prompts = list[list[int]]
Timeline = list[tuple[float, int]]


class Answer(NamedTuple):
    """What one prompt got.

    Attributes:
        tokens: Generated token ids.
        logprobs: Of each of them.
        top: For each, the two highest log-probabilities.
        steps: Forwards that verified drafts; None without speculative decoding.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[list[float]]
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is asked to generate, greedily.

    Attributes:
        kind: `batch`: all prompts at once; the answer is the seconds until the last is done. `stream`: all at once;
            the answer is a `Timeline` for each prompt, (seconds, tokens so far) at each arrival. `answers`: one at a
            time on each rank, so that batches are the same everywhere; the answer is, by rank, a list of `Answer`.
        prompts: Token ids, by rank.
        new_tokens: For every prompt.
    """

    kind: Literal["batch", "stream", "answers"]
    prompts: Mapping[int, Prompts]
    new_tokens: int


class Call(NamedTuple):
    """Another request: a method of `sglang.Engine`, whose result is the answer."""

    method: str
    arguments: Mapping[str, Any]


REPORT = "report"  # the third request: what the ranks say of themselves in /server_info


def serve(spec: Mapping[str, Any], parent: Connection) -> None:
    """In the engine's process: start it, and answer the parent until it sends None.

    Args:
        spec: `options` of `sglang.Engine`, and `routed`: whether prompts can be sent to a rank of choice.
        parent: The other end.
    """
    import sglang

    engine = sglang.Engine(**spec["options"])
    parent.send(None)
    while (request := parent.recv()) is not None:
        if request == REPORT:
            parent.send(sorted(engine.get_server_info()["internal_states"], key=rank_of))
        elif isinstance(request, Call):
            parent.send(getattr(engine, request.method)(**request.arguments))
        else:
            parent.send(engine.loop.run_until_complete(_generate(engine, request, spec["routed"])))
    engine.shutdown()


async def _generate(engine: Any, request: Request, routed: bool) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": request.new_tokens, "ignore_eos": True}

    def ask(prompt: list[int], rank: int, **more: Any) -> Any:
        where = {"routed_dp_rank": rank} if routed else {}
        return engine.async_generate(input_ids=prompt, sampling_params=sampling, **where, **more)

    async def stream(prompt: list[int], rank: int) -> Timeline:
        chunks = await ask(prompt, rank, stream=True)
        return [(time.perf_counter(), chunk["meta_info"]["completion_tokens"]) async for chunk in chunks]

    async def answers(rank: int, prompts: Prompts) -> list[Answer]:
        return [_answer(await ask(prompt, rank, return_logprob=True, top_logprobs_num=2)) for prompt in prompts]

    if request.kind == "answers":
        found = await asyncio.gather(*(answers(rank, prompts) for rank, prompts in request.prompts.items()))
        return dict(zip(request.prompts, found, strict=True))
    longest = max(map(len, request.prompts.values()))
    # Round robin, so that no rank has all of its prompts before another has its first.
    ordered = [
        (prompts[index], rank)
        for index in range(longest)
        for rank, prompts in request.prompts.items()
        if index < len(prompts)
    ]
    if request.kind == "stream":
        return await asyncio.gather(*(stream(prompt, rank) for prompt, rank in ordered))
    begin = time.perf_counter()
    await asyncio.gather(*(ask(prompt, rank) for prompt, rank in ordered))
    return time.perf_counter() - begin


def _answer(found: Mapping[str, Any]) -> Answer:
    meta = found["meta_info"]
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    top = [[entry[0] for entry in best] for best in meta["output_top_logprobs"]]
    return Answer(list(found["output_ids"]), logprobs, top, meta.get("spec_verify_ct"))


class EngineProcess:
    """An engine in another process, as the parent sees it.

    Args:
        name: For messages.
        options: Keywords of `sglang.Engine`; `port` is added unless it is there.
        environment: All variables of the process.
        folder: Where its specification and its log go.
        index: Tells the ports of engines that run at the same time apart.
        routed: Whether prompts can be sent to a rank of choice.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        folder: Path,
        *,
        index: int = 0,
        routed: bool = True,
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        spec = folder / f"{name}.spec.json"
        spec.write_text(
            json.dumps({"options": {"port": FIRST_PORT + PORTS * index, **options}, "routed": routed}, indent=1)
        )
        self.connection, child = Pipe()
        command = [sys.executable, "-m", "benchmarks.engine", str(spec), str(child.fileno())]
        self.process = Process(name, command, with_repository(environment), self.log, [child.fileno()])
        child.close()

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the engine has started.

        Raises:
            RunError: It ended, or was not ready in time.
        """
        self._receive(timeout_s, "was not ready")

    def ask(self, request: Request | Call | str, timeout_s: float = ANSWER_S) -> Any:
        """The answer to a `Request` or a `Call`, or the ranks' internal states for `REPORT`.

        Raises:
            RunError: The engine ended, or did not answer in time.
        """
        try:
            self.connection.send(request)
        except OSError:
            raise RunError(f"{self.name} has ended: {reason(self.log)}") from None
        return self._receive(timeout_s, "did not answer")

    def close(self) -> None:
        """Kill the engine and all that it started. Idempotent."""
        self.process.stop(0)
        self.connection.close()

    def _receive(self, timeout_s: float, what: str) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                if self.connection.poll(max(0.0, min(_POLL_S, left))):
                    return self.connection.recv()
            except (EOFError, OSError):
                self.process.wait(_LAST_WORDS_S)  # what it has to say may come after its end of the pipe is closed
                raise RunError(f"{self.name} ended: {reason(self.log)}") from None
            self.process.check_alive()
            if left <= 0:
                raise RunError(f"{self.name} {what} within {timeout_s:.0f} s: {reason(self.log)}")


if __name__ == "__main__":
    # The request's class must be this module's under its own name, not __main__'s.
    from benchmarks import engine as module

    os.set_inheritable(int(sys.argv[2]), False)  # the engine's processes need no copy of it
    with Connection(int(sys.argv[2])) as parent_end:
        module.serve(json.loads(Path(sys.argv[1]).read_text()), parent_end)
