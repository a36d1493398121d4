"""SGLang engines in processes of their own that are all started first and then take turns.

The speed of a host drifts by tens of percent within minutes, which would pass for a difference between engines that
are measured one after the other. Whoever waits sleeps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.processes import session

READY = "ready"
ANSWER_S = 240.0  # longest time for one run, where the caller sets none
POLL_S = 0.5
FAILED = "Scheduler hit an exception"  # SGLang's words; its processes then take a minute to end
# Engines that start together draw the same ports, so each has a range of its own, below those that systems hand out.
FIRST_PORT, PORTS = 11000, 500

Prompts = list[list[int]]
ByRank = Mapping[int, Prompts]


class EngineError(RuntimeError):
    """An engine did not start, ended, or did not answer; the others go on."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt got.

    logprobs: of the chosen tokens.  top: of each position, (log-probability, token) of the best two. Both are empty
    where they were not asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[float, int]]]


Answers = dict[int, list[Answer]]  # by rank


def start_engine(options: Mapping[str, Any], index: int) -> Any:
    """`sglang.Engine` with what all compared engines have in common; `index` tells their ports apart."""
    import sglang

    common = {"skip_tokenizer_init": True, "disable_radix_cache": True, "sleep_on_idle": True, "log_level": "info"}
    return sglang.Engine(port=FIRST_PORT + PORTS * index, **(common | dict(options)))


def answer_requests(engine: Any, descriptor: int, other: Callable[[Any], Any] | None = None) -> None:
    """In the engine's process: answer the parent until it has no more requests, then send the ranks' reports.

    other: answers requests that are no prompts.
    """
    with Connection(descriptor) as parent:
        parent.send(READY)
        while (request := parent.recv()) is not None:
            if not isinstance(request, tuple):
                assert other is not None
                parent.send(other(request))
                continue
            prompts, new_tokens, logprobs = request
            begin = time.perf_counter()
            found = engine.loop.run_until_complete(_of_all_ranks(engine, prompts, new_tokens, logprobs))
            parent.send((time.perf_counter() - begin, found))
        states = engine.get_server_info()["internal_states"]
        parent.send([state.get("dwdp") for state in states])
    engine.shutdown()


async def _of_all_ranks(engine: Any, prompts: ByRank, new_tokens: int, logprobs: bool) -> Answers:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    options: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": 2} if logprobs else {}

    async def of_rank(rank: int) -> list[Answer]:
        found = await engine.async_generate(
            input_ids=prompts[rank], sampling_params=sampling, routed_dp_rank=rank, **options
        )
        return [_answer(each) for each in found]

    done = await asyncio.gather(*(of_rank(rank) for rank in prompts))
    return dict(zip(prompts, done, strict=True))


def _answer(found: Mapping[str, Any]) -> Answer:
    meta = found["meta_info"]
    chosen = [entry[0] for entry in meta.get("output_token_logprobs") or ()]
    top = [[(entry[0], entry[1]) for entry in best] for best in meta.get("output_top_logprobs") or ()]
    return Answer(list(found["output_ids"]), chosen, top)


class EngineProcess:
    """An engine in another process, as the parent sees it."""

    def __init__(self, name: str, connection: Connection, log: Path) -> None:
        self.name = name
        self._connection = connection
        self._log = log

    def ready(self, deadline: float) -> bool:
        """Whether it comes up before the deadline (of the monotonic clock)."""
        try:
            return bool(self._receive(deadline - time.monotonic()) == READY)
        except EngineError:
            return False

    def run(
        self, prompts: ByRank, new_tokens: int, *, logprobs: bool = False, timeout_s: float = ANSWER_S
    ) -> tuple[float, Answers]:
        """Seconds until the last of all ranks' prompts is done, and what each got.

        Raises:
            EngineError: the engine ended, or did not answer in time.
        """
        result: tuple[float, Answers] = self.ask((prompts, new_tokens, logprobs), timeout_s)
        return result

    def stop(self, timeout_s: float = ANSWER_S) -> list[Any]:
        """Let the engine end; the ranks' reports.

        Raises:
            EngineError: as `run`.
        """
        reports: list[Any] = self.ask(None, timeout_s)
        return reports

    def ask(self, request: object, timeout_s: float = ANSWER_S) -> Any:
        """The answer to a request of any kind that the engine's process knows.

        Raises:
            EngineError: as `run`.
        """
        try:
            self._connection.send(request)
        except OSError:
            raise EngineError(f"the engine of {self.name} has ended") from None
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                if self._connection.poll(max(0.0, min(POLL_S, left))):
                    return self._connection.recv()
            except (EOFError, OSError):
                raise EngineError(f"the engine of {self.name} ended while it was waited for") from None
            if FAILED in self._log.read_text(errors="replace"):
                raise EngineError(f"a scheduler of {self.name} failed")
            if left <= 0:
                raise EngineError(f"the engine of {self.name} did not answer within {timeout_s:.0f} s")


@contextmanager
def engine_process(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[EngineProcess]:
    """A process that runs `command --connection FD`. Everything that it started is gone afterwards.

    environment: added to this process's.
    """
    mine, theirs = Pipe()
    descriptor = theirs.fileno()
    with mine, session([*command, "--connection", str(descriptor)], log, environment, [descriptor]):
        theirs.close()
        yield EngineProcess(name, mine, log)
