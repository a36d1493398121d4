"""A server under load for as long as is wanted: `python -m tests.e2e.soak --minutes 30`, or `--kills 20`.

The load has long prompts, streams that clients leave, and a rank that is stopped for a while in the middle. In the end
the ranks must hold what they held when they were warm, a rank is killed, and the server is stopped, after which nothing
may be left. With --kills servers are started until so many ranks were killed, each while at least one other lives.
Every answer is checked. Prints what was measured; exit code 1 where something is not as it was.
"""

from __future__ import annotations

import argparse
import collections
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sglang_dwdp.demo.server import Server
from tests.e2e.conftest import FLAGS, Footprint
from tests.e2e.load import RETRY, RIGHT, Answer, Held, Load, rank_process
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import make_checkpoint
from tests.fixtures.reference import greedy_tokens

LONG = tuple(" ".join(PROMPTS[-count:]) for count in (3, 5))  # about 1,400 and 2,000 tokens
CHUNK = 512
SLACK_S = 5.0


def say(text: str) -> None:
    """Print with the time of day, at once."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def summary(answers: Sequence[Answer]) -> str:
    """How many answers there were of each kind, and the longest one."""
    counts = collections.Counter(answer.what for answer in answers)
    return f"{dict(counts)}, longest {max((answer.seconds for answer in answers), default=0):.2f} s"


class Soak:
    """A model, its expected tokens, and what was found wrong."""

    def __init__(self, folder: Path, ranks: int, dwdp: Sequence[str]) -> None:
        self._folder, self._ranks, self._dwdp = folder, ranks, dwdp
        self.wrong: list[str] = []
        self._model = folder / "model"
        self._model.mkdir()
        make_checkpoint(self._model, "qwen3_moe", dtype=torch.float32, num_experts=8)
        self._prompts = (*PROMPTS, *LONG)
        self._expected = greedy_tokens(self._model, self._prompts, MAX_NEW_TOKENS, None)

    def check(self, is_right: bool, what: str) -> None:
        """Say what was seen, and note it where it is wrong."""
        say(("" if is_right else "WRONG: ") + what)
        if not is_right:
            self.wrong.append(what)

    @contextmanager
    def server(self) -> Iterator[Server]:
        """A server that is ready; stopped in the end, after which nothing may be left."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        footprint = Footprint(folder)
        environment = {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        flags = (*FLAGS, "--chunked-prefill-size", str(CHUNK))
        server = Server(self._model, self._ranks, folder / "log", dwdp=self._dwdp, flags=flags, environment=environment)
        try:
            server.wait()
            yield server
            code = server.stop()
            left = footprint.left()
            self.check(code == 0 and not left, f"stopped with exit code {code}; left behind: {left or 'nothing'}")
        finally:
            server.kill()

    def load(self, server: Server, seed: int) -> Load:
        """Eight clients, a fifth of whose streams are left."""
        return Load(server, self._expected, prompts=self._prompts, abort_share=0.2, seed=seed)

    def run(self, minutes: float, stopped_s: float) -> None:
        """The soak."""
        with self.server() as server:
            pids = [rank_process(server, rank).pid for rank in range(self._ranks)]
            with self.load(server, 0):
                time.sleep(min(60.0, 6 * minutes))
            warm = [Held.by(pid) for pid in pids]
            say(f"warm: {warm}")
            with self.load(server, 1) as load:
                time.sleep(30 * minutes)
                stopped = rank_process(server, self._ranks - 1)
                stopped.send_signal(signal.SIGSTOP)
                since = time.monotonic()
                time.sleep(stopped_s)
                until = time.monotonic()
                stopped.send_signal(signal.SIGCONT)
                time.sleep(30 * minutes)
            meanwhile = [answer for answer in load.between(since + 1, until) if answer.rank < self._ranks - 1]
            self.check({answer.what for answer in load.answers} == {RIGHT}, summary(load.answers))
            self.check(
                {answer.rank for answer in load.between(since + 1, until)} <= {*range(-1, self._ranks - 1)},
                f"asked for while rank {self._ranks - 1} was stopped for {stopped_s:g} s: {summary(meanwhile)}",
            )
            time.sleep(5)
            held = [Held.by(pid) for pid in pids]
            self.check(held == warm, f"in the end: {held}")
            self._kill(server, 1)

    def kills(self, count: int) -> None:
        """Kill so many ranks, of as many servers as that takes."""
        killed = 0
        while killed < count:
            with self.server() as server:
                living = list(range(self._ranks))
                while len(living) > 1 and killed < count:
                    killed += 1
                    say(f"kill {killed}")
                    self._kill(server, living.pop(killed % len(living)))

    def _kill(self, server: Server, rank: int) -> None:
        with self.load(server, 2 + rank) as load:
            time.sleep(6)
            usual = max(answer.seconds for answer in load.answers)
            killed = time.monotonic()
            rank_process(server, rank).kill()
            time.sleep(8)
        whats = {answer.what for answer in load.answers}
        lost = [answer for answer in load.answers if answer.what == RETRY]
        later = load.between(killed + 1)
        self.check(whats <= {RIGHT, RETRY}, f"rank {rank} killed: {summary(load.answers)}")
        self.check(len(lost) <= 8 and all(answer.what == RIGHT for answer in later), f"{len(lost)} of its requests")
        longest = max(answer.seconds for answer in load.answers)
        self.check(longest < usual + SLACK_S, f"longest {longest:.2f} s, before the kill {usual:.2f} s")


def main() -> int:
    """Parse arguments, soak, and say whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load. Default: 30.")
    parser.add_argument("--stopped-s", type=float, default=20.0, help="that a rank is stopped. Default: 20.")
    parser.add_argument("--kills", type=int, default=0, help="instead of the soak, kill so many ranks.")
    parser.add_argument("--ranks", type=int, default=3, help="of the server. Default: 3.")
    parser.add_argument("--dwdp", default="", help="further options of DWDP, in one argument.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), arguments.ranks, arguments.dwdp.split())
        if arguments.kills:
            soak.kills(arguments.kills)
        else:
            soak.run(arguments.minutes, arguments.stopped_s)
    say(f"{len(soak.wrong)} wrong" if soak.wrong else "all was well")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
