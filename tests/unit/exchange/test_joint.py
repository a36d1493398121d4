"""Joint forwards as an engine runs them: ranks of different load, idle ones, and one that fails."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange import host_inbox, page
from sglang_dwdp.exchange.host_inbox import HostInbox
from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.exchange.joint import JointForwards
from sglang_dwdp.exchange.layer import shard_table
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.policy import StepTimes
from sglang_dwdp.experts.placement import balanced
from tests.unit.exchange.moe import Weights

HIDDEN, TOP_K, EXPERTS, LAYERS = 8, 2, 6, 3
SHAPE = RowShape(max_bucket=4, hidden_size=HIDDEN, top_k=TOP_K, dtype=torch.bfloat16)
WEIGHTS = Weights.random(EXPERTS, HIDDEN, 4)
# Patient, for a busy machine; tests/unit/exchange/test_policy.py has the rest.
TIMES = StepTimes(alone=((1, 1e6),), joint=((1, 0.0),))


class Engine:
    """A rank that routes by rank of the row's elements, and runs layers alone or jointly."""

    def __init__(self, rank: int, size: int, page_fd: int, inbox_fd: int, limit_s: float) -> None:
        meeting = Meeting(page.Page(page_fd, rank, size), TIMES)
        inbox = HostInbox(inbox_fd, rank, size, SHAPE, limit_s, meeting.page.lost)
        self.forwards = JointForwards(meeting, inbox, limit_s)
        shard = balanced(EXPERTS, size).shard(rank)
        self.shard, self.table = WEIGHTS.shard(shard).experts(), shard_table(EXPERTS, shard, "cpu", local=True)
        self.joint = 0

    def step(self, rows: torch.Tensor) -> torch.Tensor:
        joint = None
        if len(rows) > SHAPE.max_bucket:
            self.forwards.go_away(5_000)
        else:
            joint = self.forwards.begin(len(rows))
        if joint is None and not len(rows):
            return rows
        for layer in range(LAYERS):
            ids = rows.float()[:, :EXPERTS].argsort(dim=1)[:, :TOP_K].int()
            weights = rows.float().softmax(dim=1)[:, :TOP_K].contiguous()
            if joint is None:
                rows = rows + WEIGHTS.experts()(rows, ids, weights)
            else:
                rows = rows + self.forwards.layer(layer, rows, ids, weights, self.shard, self.table)
        self.forwards.end()()
        self.joint += joint is not None
        return rows


@contextmanager
def engines(size: int, limit_s: float = 20) -> Iterator[list[Engine]]:
    fds = page.create(), host_inbox.create(size, SHAPE)
    made = [Engine(rank, size, *fds, limit_s) for rank in range(size)]
    for fd in fds:
        os.close(fd)
    try:
        yield made
    finally:
        for engine in made:
            engine.forwards.close()
            engine.forwards.close()


def on_all(made: list[Engine], work: Callable[[int, Engine], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(made)) as pool:
        return list(pool.map(work, range(len(made)), made))


def batch(rng: random.Random) -> torch.Tensor:
    count = rng.choice([1, 2, 4, 4, 6])  # 6 is too many to be joint
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(rng.getrandbits(30))).bfloat16()


@pytest.mark.parametrize("size", [2, 3])
def test_whatever_is_joint_the_results_are_those_of_running_alone(size: int) -> None:
    """But for the rounding of partial sums. The last rank is idle."""

    def work(rank: int, engine: Engine) -> list[float]:
        rng, errors = random.Random(rank), []
        if rank == size - 1:
            end = time.monotonic() + 20
            while not engine.forwards._meeting.ended and time.monotonic() < end:
                engine.step(torch.empty(0, HIDDEN).bfloat16())
                time.sleep(100e-6)
            return []
        for _ in range(40):
            rows = batch(rng)
            found = engine.step(rows)
            wanted = alone(rows)
            errors.append(float((found.float() - wanted.float()).norm() / wanted.float().norm()))
        engine.forwards.close()  # which lets the others go on alone
        return errors

    def alone(rows: torch.Tensor) -> torch.Tensor:
        for _ in range(LAYERS):
            ids = rows.float()[:, :EXPERTS].argsort(dim=1)[:, :TOP_K].int()
            weights = rows.float().softmax(dim=1)[:, :TOP_K].contiguous()
            rows = rows + WEIGHTS.experts()(rows, ids, weights)
        return rows

    with engines(size) as made:
        *busy, idle = on_all(made, work)
        joint = [engine.joint for engine in made]
        reports = [engine.forwards.report() for engine in made]
    assert idle == []
    assert min(joint) > 5
    assert len(set(joint)) == 1
    for errors in busy:
        # Near ties in routing may fall to another expert; that is what rounding does to any batch.
        assert sorted(errors)[len(errors) * 9 // 10] < 0.02
    assert reports[-1]["helped_rounds"] == joint[-1]
    assert reports[-1]["helped_rows"] > 0
    assert reports[0]["joint_rounds"] == joint[0]


def test_a_rank_that_fails_in_a_joint_forward_is_named_and_the_others_go_on_alone() -> None:
    rows = torch.ones(2, HIDDEN).bfloat16()

    def work(rank: int, engine: Engine) -> Any:
        if rank == 1:
            assert engine.forwards.begin(2) is not None
            engine.forwards.close()  # its process ends
            return None
        with pytest.raises(DwdpRuntimeError, match="MoE layer 0 of a joint forward: rank 1 sent no rows: its process"):
            engine.step(rows)
        result = engine.step(rows)  # the round has ended
        return engine.joint, engine.forwards.report()["joint_rounds_ended"], len(result)

    with engines(3) as made:
        assert on_all(made, work) == [(0, True, 2), None, (0, True, 2)]


def test_graphs_are_captured_without_a_round() -> None:
    def work(rank: int, engine: Engine) -> int:
        with engine.forwards.capturing(4):
            ids, weights = torch.zeros(4, TOP_K, dtype=torch.int32), torch.ones(4, TOP_K)
            rows = engine.forwards.layer(0, torch.ones(4, HIDDEN).bfloat16(), ids, weights, engine.shard, engine.table)
        assert engine.forwards.bucket is None
        return len(rows)

    with engines(2) as made:
        assert on_all(made, work) == [4, 4]


class Event:
    """A GPU's event that happens when it is waited for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def synchronize(self) -> None:
        self.log.append(self.name)

    def query(self) -> bool:
        return self.name in self.log


def test_a_rank_enters_when_its_gpu_is_free() -> None:
    """But after a joint forward at once: its peers are as far as it is."""
    log: list[str] = []

    def joint(rank: int, engine: Engine) -> None:
        assert engine.forwards.begin(1) is not None
        engine.forwards.end(Event(log, "joint"))

    with engines(2) as made:
        engine, peer = made
        engine.forwards.go_away(1000)
        engine.forwards.end(Event(log, "large"))
        assert engine.forwards.is_behind()
        assert log == []
        on_all(made, joint)
        assert log == ["large"]
        assert not engine.forwards.is_behind()
        on_all(made, joint)
        assert log == ["large"]
        peer.forwards.close()
        for _ in range(2):
            assert engine.forwards.begin(1) is None
            engine.forwards.end(Event(log, "alone"))
        assert log == ["large", "alone"]


def test_a_forward_that_saves_nothing_runs_alone_behind_the_one_before() -> None:
    """Though a peer has entered, which would wait in its kernels for the one before."""
    log: list[str] = []
    with engines(2) as made:
        engine, peer = made
        engine.forwards.times = StepTimes(alone=((1, 1.0),), joint=((1, 2.0),))
        engine.forwards.go_away(0)
        engine.forwards.end(Event(log, "large"))
        peer.forwards._meeting.page.change(lambda state: state.enter(1, 1))
        assert engine.forwards.begin(1) is None
        assert log == []
        assert engine.forwards.report()["alone_rounds"] == 1
        log.append("large")  # the GPU has run it
        assert engine.forwards.begin(1) is not None


def test_a_rank_helps_while_its_gpu_runs_a_forward_of_its_own() -> None:
    """Which is waited for after that as before."""
    log: list[str] = []

    with engines(2) as made:
        engine, peer = made
        engine.forwards.go_away(0)
        engine.forwards.end(Event(log, "large"))
        peer.forwards._meeting.page.change(lambda state: state.enter(1, 1))
        helped = engine.forwards.begin(0)
        assert helped is not None
        assert helped.buckets == (0, 1)
        wait = engine.forwards.end(Event(log, "help"), helping=True)
        engine.forwards._inbox.wait = lambda done, limit_s: done.synchronize()  # type: ignore[method-assign]
        wait()
        assert log == ["help"]
        on_all(made, lambda rank, each: each.forwards.begin(1))
        assert log == ["help", "large"]


def test_a_failed_wait_ends_joint_forwards() -> None:
    def work(rank: int, engine: Engine) -> Any:
        engine.forwards.begin(1)
        wait = engine.forwards.end(object())
        if rank == 0:
            engine.forwards._inbox.wait = fail
            with pytest.raises(DwdpRuntimeError, match="gone"):
                wait()
            return None
        wait()
        return time.monotonic()

    def fail(done: Any, limit_s: float) -> None:
        raise DwdpRuntimeError("gone")

    with engines(2) as made:
        on_all(made, work)
        assert [engine.forwards.begin(1) for engine in made] == [None, None]
        assert [engine.forwards.report()["joint_rounds_ended"] for engine in made] == [True, True]
