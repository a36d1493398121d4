"""Prefills that are captured in pieces: waits and releases around each piece, at every replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.staged_layers import GraphSegment
from tests.fixtures.ranks import Experts, PlainLayer, checkpoint, equal, forward, run_ranks


class Capture:
    """What SGLang's breakable capture does, with graphs that read what was bound when they were captured."""

    def __init__(self, runtime: DwdpRuntime, layers: Sequence[PlainLayer]) -> None:
        self.runtime, self.layers = runtime, layers
        self.capturing = False
        self.seen: list[dict[str, torch.Tensor]] = []

    def graphs(self, num_tokens: int, pieces: Sequence[int]) -> list[Any]:
        """The graphs of a forward with so many layers in each of its pieces, after a warm-up."""
        graphs, layers = [], iter(self.layers)
        with self.runtime.capture(num_tokens, lambda: self.capturing):
            for layer in self.layers:
                self.runtime.wait(layer.layer_id)
                self.runtime.release(layer.layer_id)
            for count in pieces:
                self.capturing = True
                bound = []
                for _ in range(count):
                    layer = next(layers)
                    self.runtime.wait(layer.layer_id)
                    bound.append(dict(layer.tensors))
                    self.runtime.release(layer.layer_id)
                self.capturing = False
                graphs.append(self.runtime.staged.segment(self.graph(bound)))
        return graphs

    def graph(self, bound: Sequence[Experts], after: Callable[[Experts], None] = lambda _: None) -> Any:
        seen = self.seen

        class Graph:
            def replay(self) -> None:
                for tensors in bound:
                    seen.append({name: tensor.clone() for name, tensor in tensors.items()})
                    after(tensors)

        return Graph()

    def replay(self, graphs: Sequence[Any], num_tokens: int) -> list[dict[str, torch.Tensor]]:
        self.seen.clear()
        self.runtime.begin_forward(num_tokens)
        for graph in graphs:
            graph.replay()
        self.runtime.end_forward(num_tokens, replayed=True)
        return list(self.seen)


@pytest.mark.parametrize("view", ["auto", "staged"])
@pytest.mark.parametrize("pieces", [(0, 1, 1, 1, 1, 1, 0), (1, 2, 2, 0), (2, 1, 2)])
def test_replays_read_every_layers_experts(view: Any, pieces: tuple[int, ...]) -> None:
    full = checkpoint(5, 8, {"w1": (32, 64), "scale": (3,)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        capture = Capture(runtime, layers)
        graphs = capture.graphs(1000, pieces)
        assert [isinstance(graph, GraphSegment) for graph in graphs] == [count > 0 for count in pieces]
        before = runtime.report()
        same = [equal(capture.replay(graphs, 900), full) for _ in range(4)]
        same += [equal(forward(runtime, layers, tokens), full) for tokens in (1000, 1)]  # eager ones in between
        same += [equal(capture.replay(graphs, 1000), full) for _ in range(2)]
        after = runtime.report()
        counted = {name: after[name] - before[name] for name in ("staged_forwards", "direct_forwards", "late_fills")}
        return same, counted, after["late_fills"]

    results = run_ranks(2, full, step, DwdpConfig(view=view, depth=2, timeout_s=20))
    direct = 1 if view == "auto" else 0
    counts = {"staged_forwards": 8 - direct, "direct_forwards": direct, "late_fills": 0}
    assert results == [([True] * 8, counts, 0)] * 2


def test_a_small_bucket_is_captured_over_direct_views() -> None:
    full = checkpoint(3, 8, {"w1": (32, 64)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        capture = Capture(runtime, layers)
        graphs = capture.graphs(16, (1, 1, 1))
        seen = capture.replay(graphs, 9)
        report = runtime.report()
        plain = not any(isinstance(graph, GraphSegment) for graph in graphs)
        return plain, equal(seen, full), report["direct_forwards"], report["bytes_copied"]

    config = DwdpConfig(direct_max_tokens=16, timeout_s=20)
    assert run_ranks(2, full, step, config) == [(True, True, 1, 0)] * 2


def test_the_bucket_decides_and_not_the_tokens() -> None:
    """A forward of few tokens, padded to a bucket above the limit, replays a staged graph."""
    full = checkpoint(3, 8, {"w1": (32, 64)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        capture = Capture(runtime, layers)
        graphs = capture.graphs(32, (1, 1, 1))
        seen = [equal(capture.replay(graphs, 15), full) for _ in range(3)]
        report = runtime.report()
        return seen, report["direct_forwards"], report["staged_forwards"], report["late_fills"]

    config = DwdpConfig(direct_max_tokens=16, timeout_s=20)
    assert run_ranks(2, full, step, config) == [([True] * 3, 0, 3, 0)] * 2


def test_no_poison_of_a_released_slot_is_read() -> None:
    full = checkpoint(5, 8, {"w1": (32, 64)})  # an expert is one page

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        own = layers[0].placement.shard(runtime.rank)

        def poison(tensors: Experts) -> None:  # every page that is not this rank's own
            tensors["w1"][: own.start].fill_(float("nan"))
            tensors["w1"][own.stop :].fill_(float("nan"))

        capture = Capture(runtime, layers)
        plain = capture.graph
        capture.graph = lambda bound: plain(bound, poison)  # type: ignore[method-assign, assignment, misc]
        graphs = capture.graphs(1000, (1,) * 5)
        return all(equal(capture.replay(graphs, 1000), full) for _ in range(100))

    assert run_ranks(2, full, step, DwdpConfig(view="staged", timeout_s=20)) == [True, True]


def test_a_piece_with_more_layers_than_slots_is_an_error() -> None:
    full = checkpoint(3, 8, {"w1": (32, 64)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> None:
        Capture(runtime, layers).graphs(1000, (3,))

    for error in run_ranks(2, full, step, DwdpConfig(depth=2, timeout_s=20)):
        assert isinstance(error, DwdpRuntimeError)
        assert "has 3 MoE layers, and there are 2 slots" in str(error)
        assert "--dwdp-depth 3" in str(error)


def test_a_replay_that_misses_a_layer_is_noticed() -> None:
    """One layer twice and another not at all is not the same as all of them."""
    full = checkpoint(3, 8, {"w1": (32, 64)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> None:
        capture = Capture(runtime, layers)
        first, second, _ = capture.graphs(1000, (1, 1, 1))
        capture.replay([first, second, second], 1000)

    for error in run_ranks(2, full, step):
        assert isinstance(error, DwdpRuntimeError)
        assert "visited 2 of 3 MoE layers" in str(error)


def test_after_a_forward_that_raised_the_next_one_runs() -> None:
    full = checkpoint(3, 8, {"w1": (32, 64)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        runtime.begin_forward(1000)
        runtime.prime()
        runtime.wait(layers[0].layer_id)
        runtime.abort_forward()
        idle = runtime.in_forward
        return idle, equal(forward(runtime, layers, 1000), full), runtime.report()["staged_forwards"]

    assert run_ranks(2, full, step) == [(False, True, 1)] * 2
