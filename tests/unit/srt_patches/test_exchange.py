"""Where exchange steps are possible."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.exchange.policy import StepTimes
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.srt_patches import exchange_steps as exchange_steps_module
from sglang_dwdp.srt_patches.exchange import why_alone
from sglang_dwdp.srt_patches.exchange_steps import ExchangeSteps
from sglang_dwdp.srt_patches.joint_layers import JointLayers

SHAPE = RowShape(8, 64, 8, torch.bfloat16)


class UnquantizedFusedMoEMethod:
    """Stands for SGLang's method of this name."""


class ModelOptFp8MoEMethod:
    """Stands for SGLang's method of this name."""


def layer(
    *, experts: int = 16, hidden: int = 64, top_k: int = 8, backend: str = "triton", method: object = None
) -> Any:
    fused = SimpleNamespace(
        layer_id=0,
        hidden_size=hidden,
        top_k=top_k,
        runner_backend=SimpleNamespace(value=backend),
        quant_method=method or UnquantizedFusedMoEMethod(),
    )
    return SimpleNamespace(placement=balanced(experts, 2), fused=fused)


def test_equal_layers_can_run_jointly() -> None:
    assert why_alone([layer(), layer()], 2, SHAPE, "cuda") is None
    assert why_alone([layer(backend="flashinfer_cutlass")], 2, SHAPE, "cpu") is None


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([layer(), layer(experts=12)], "differ in their numbers of experts"),
        ([layer(), layer(hidden=32)], "differ in their numbers of experts, or in their rows"),
        ([layer(), layer(top_k=4)], "or in their rows"),
        ([layer(), layer(backend="flashinfer_cutlass")], "validated with the MoE runner backend triton"),
        ([layer(method=ModelOptFp8MoEMethod())], "not FP8 experts with triton"),
        ([layer(experts=17)], "shares experts evenly"),
    ],
)
def test_others_decode_alone(layers: list[Any], why: str) -> None:
    answer = why_alone(layers, 2, SHAPE, "cuda")
    assert answer is not None
    assert why in answer


class Forwards:
    """Joint forwards of a rank whose peers wait `rounds` times, and whose GPU is done after `looks` looks."""

    def __init__(self, rounds: int, looks: int) -> None:
        self.rounds, self.looks = rounds, looks
        self.bucket: int | None = None
        self.times = StepTimes([(512, 9_000.0), (1024, 9_000.0)], [(512, 4_000.0), (1024, 7_000.0)])
        self.until: Callable[[Any], None] = lambda done: None
        self.running = self.most = self.helped = self.away = 0
        self.away_us = 0.0

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def begin(self, bucket: int, rows: int | None = None, *, wait: bool = True) -> object | None:
        assert bucket == 0
        self.waits = wait
        if self.rounds == 0:
            return None
        self.rounds -= 1
        self.bucket = 4
        return object()

    def go_away(self, away_us: float) -> None:
        self.away += 1
        self.away_us = away_us

    def end(self, done: Any, *, helping: bool) -> Callable[[], None]:
        assert helping
        self.bucket = None
        self.running += 1
        self.helped += 1
        self.most = max(self.most, self.running)

        def wait() -> None:
            self.running -= 1

        return wait


class Rounds(Forwards):
    """Rounds as the peers make them: the buckets of each that this rank, of number 0, comes to with rows."""

    rank = 0

    def __init__(self, *rounds: tuple[int, int] | None) -> None:
        super().__init__(rounds=0, looks=0)
        self.coming, self.began = list(rounds), list[int]()

    def begin(self, bucket: int, rows: int | None = None, *, wait: bool = True) -> Any:
        self.began.append(bucket)
        self.rows = rows
        buckets = self.coming.pop(0)
        self.bucket = max(buckets) if buckets else None
        return SimpleNamespace(buckets=buckets) if buckets else None


def exchange_steps(forwards: Forwards) -> ExchangeSteps:
    shape = RowShape(max_bucket=1024, hidden_size=4, top_k=2, dtype=torch.float32)
    layers = JointLayers(forwards, {}, shape, "cpu")  # type: ignore[arg-type]
    return ExchangeSteps(forwards, None, layers, (512, 1024))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rounds", "looks", "helped"), [(0, 3, 0), (5, 20, 5), (20, 5, 5), (3, 0, 0)])
def test_peers_are_helped_for_as_long_as_an_own_forward_runs(rounds: int, looks: int, helped: int) -> None:
    forwards = Forwards(rounds, looks)
    exchange_steps(forwards)
    forwards.until(forwards)
    assert forwards.helped == helped
    assert forwards.most == min(helped, 2)  # no further ahead of the GPU than the peers
    assert forwards.running == 0


def test_peers_are_helped_between_pieces_of_a_prefill_that_is_launched() -> None:
    forwards = Forwards(rounds=2, looks=0)
    steps = exchange_steps(forwards)
    assert not steps.begin(4096, is_decode=False)
    for _ in range(4):
        steps.between_pieces()
    assert forwards.helped == 2
    assert forwards.running == 0
    assert not forwards.waits


def test_between_pieces_no_help_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forwards of peers still run on the GPU, so a third has to wait."""
    forwards = Forwards(rounds=3, looks=0)
    steps = exchange_steps(forwards)
    steps._last_joint = SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(steps, "_join", lambda rows: None)
    for _ in range(4):
        steps.between_pieces()
    assert (forwards.helped, forwards.running) == (2, 2)


def test_peers_wait_for_a_prefill_no_longer_than_for_its_longest_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1.0]
    monkeypatch.setattr(exchange_steps_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(exchange_steps_module, "_event", lambda: SimpleNamespace())
    forwards = Forwards(rounds=0, looks=0)
    forwards.end = lambda done: lambda: None  # type: ignore[assignment,method-assign,misc]
    steps = exchange_steps(forwards)
    steps.layers.beside = object()
    for expected in (0.0, 3000.0):
        steps.begin(4096, is_decode=False)
        assert forwards.away_us == pytest.approx(expected)
        for seconds in (0.001, 0.003):
            now[0] += seconds
            steps.between_pieces()
        now[0] += 0.001
        steps.end(is_joint=False)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> tuple[Forwards, ExchangeSteps]:
    """As on a GPU, where helping runs beside a forward of the rank's own."""
    forwards = Forwards(rounds=100, looks=0)
    steps = exchange_steps(forwards)
    steps.layers.beside = object()
    monkeypatch.setattr(steps, "_run_help", lambda: setattr(forwards, "helped", forwards.helped + 1))
    return forwards, steps


def test_a_scheduler_helps_peers_while_it_works_unless_its_decode_may_be_next(
    beside: tuple[Forwards, ExchangeSteps],
) -> None:
    forwards, steps = beside
    for behind, is_prefill_next, helped in ((False, False, 0), (False, True, 1), (True, False, 2), (True, True, 3)):
        forwards.is_behind = lambda behind=behind: behind  # type: ignore[attr-defined]
        steps.while_scheduling(is_prefill_next=is_prefill_next)
        assert forwards.helped == helped
    assert not forwards.waits
    steps.layers.beside = None  # on the CPU helping takes as long as a forward of the peers
    steps.while_scheduling(is_prefill_next=True)
    assert forwards.helped == 3


def test_peers_are_helped_before_a_long_prefill_begins_and_before_its_graph(
    beside: tuple[Forwards, ExchangeSteps],
) -> None:
    forwards, steps = beside
    steps.before_replay()
    assert forwards.helped == 0  # of a capture, or of a joint forward
    helped_at: list[int] = []
    forwards.go_away = lambda away_us: helped_at.append(forwards.helped)  # type: ignore[method-assign]
    steps.begin(4096, is_decode=False)
    assert helped_at == [1]
    steps.before_replay()
    assert forwards.helped == 2


def test_an_idle_rank_waits_for_its_help_once_nobody_wants_more() -> None:
    forwards = Forwards(rounds=3, looks=0)
    steps = exchange_steps(forwards)
    assert [steps.help_out() for _ in range(4)] == [True, True, True, False]
    assert forwards.running == 0


def test_a_peer_that_leaves_while_it_is_helped_costs_no_own_forward() -> None:
    forwards = Forwards(rounds=2, looks=2)
    ended: list[str] = []

    def end(done: Any, *, helping: bool) -> Callable[[], None]:
        def wait() -> None:
            ended.append("help")
            raise DwdpRuntimeError("rank 1 ended")

        return wait

    forwards.end = end  # type: ignore[method-assign]
    forwards.synchronize = lambda: ended.append("own")  # type: ignore[attr-defined]
    exchange_steps(forwards)
    forwards.until(forwards)
    assert ended == ["help", "help", "own"]


def test_a_rank_that_decodes_helps_prefills_and_comes_again() -> None:
    forwards = Rounds((0, 1024), (0, 512), (4, 8))
    assert exchange_steps(forwards).begin(4, is_decode=True)
    assert forwards.began == [4, 4, 4]
    assert forwards.rows is None
    assert forwards.helped == 2
    forwards = Rounds((0, 1024), None)
    assert not exchange_steps(forwards).begin(4, is_decode=True)
    assert forwards.helped == 1


def test_prefills_without_end_do_not_keep_a_rank_from_decoding() -> None:
    forwards = Rounds(*[(0, 1024)] * 100)
    assert not exchange_steps(forwards).begin(4, is_decode=True)
    assert 1 < forwards.helped < 20
    assert forwards.bucket is None


def test_a_short_prefill_takes_the_next_bucket() -> None:
    forwards = Rounds((512, 4), (1024, 0), None)
    steps = exchange_steps(forwards)
    assert steps.begin(5, is_decode=False)
    assert forwards.rows == 5
    assert steps.begin(513, is_decode=False)
    assert forwards.away == 0
    assert not steps.begin(600, is_decode=False)
    assert forwards.began == [512, 1024, 1024]
    assert forwards.away == 1


def test_a_decode_larger_than_its_graphs_meets_nobody() -> None:
    """A peer with fewer rows would be asked for a graph of a size that there is not."""
    steps = exchange_steps(Rounds())
    assert steps.bucket_of(9) == 9
    steps.layers._graphs = dict.fromkeys((8, 4, 512))
    assert [steps.bucket_of(rows) for rows in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, 0]
    assert not steps.begin(9, is_decode=True)
    assert steps.forwards.began == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rows", "joint_us"), [(0, 7_000.0), (1025, 7_000.0), (513, 8_000.0)])
def test_a_prefill_of_another_size_or_that_is_hardly_slower_alone_meets_nobody(rows: int, joint_us: float) -> None:
    forwards = Rounds()
    forwards.times = StepTimes(forwards.times.alone, [(512, 4_000.0), (1024, joint_us)])
    assert not exchange_steps(forwards).begin(rows, is_decode=False)
    assert forwards.began == []
    assert forwards.away == 1
