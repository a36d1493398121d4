"""The ring of slots, against a model of two streams that runs copies as late, or as early, as events allow."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.memory.base import CopyList, Event
from sglang_dwdp.memory.host_shm import HostCopyEngine
from sglang_dwdp.prefetch import Prefetcher


@dataclass
class Slots:
    """Slots as lists of the layer they hold; `reader[slot]` is set while the compute stream reads it."""

    holds: list[int]
    reader: list[int | None] = field(default_factory=list)


class ModelEvent:
    def __init__(self) -> None:
        self.happened = True


class ModelEngine:
    """Runs a fill only when something waits for it (late), or as soon as it is enqueued (early)."""

    def __init__(self, apply: Callable[[CopyList], None], late: bool) -> None:
        self.apply, self.late = apply, late
        self.queue: list[tuple[CopyList, ModelEvent, ModelEvent]] = []
        self.fills = 0

    def event(self) -> Event:
        return ModelEvent()

    def record(self, event: ModelEvent) -> None:
        event.happened = True

    def prepare(self, copies: CopyList) -> CopyList:
        return copies

    def fill(self, copies: CopyList, after: ModelEvent, done: ModelEvent) -> None:
        self.fills += 1
        done.happened = False
        self.queue.append((copies, after, done))
        if not self.late:
            self.run()

    def exposed_s(self) -> float:
        return 0.0

    def wait(self, done: ModelEvent) -> None:
        # No further than to the last fill that `done` was given to: that is all a real engine promises.
        while not done.happened:
            self.run_one()

    def run(self) -> None:
        while self.queue:
            self.run_one()

    def run_one(self) -> None:
        copies, after, done = self.queue.pop(0)
        assert after.happened
        self.apply(copies)
        done.happened = all(later is not done for _, _, later in self.queue)

    def close(self) -> None:
        pass


def simulate(num_layers: int, depth: int, late: bool, steps: list[list[int]]) -> tuple[Prefetcher, ModelEngine]:
    """Run steps (lists of layers in order); every layer must find its own experts, from wait to release."""
    used = min(depth, num_layers)
    holds, reading = [-1] * used, [False] * used

    def apply(copies: CopyList) -> None:
        (layer,) = copies
        slot = layer % used
        assert not reading[slot], "a slot was overwritten while it was read"
        holds[slot] = layer

    engine = ModelEngine(apply, late)
    ring = Prefetcher(engine, [[layer] for layer in range(num_layers)], [1] * num_layers, depth)
    for step in steps:
        ring.prime()
        for layer in step:
            ring.wait(layer)
            assert holds[layer % used] == layer
            reading[layer % used] = True
            engine.run()  # copies that are allowed by now must not touch what is read
            assert holds[layer % used] == layer
            reading[layer % used] = False
            ring.release(layer)
    return ring, engine


shapes = st.tuples(st.integers(1, 9), st.integers(1, 12), st.booleans())


@given(shapes, st.integers(1, 4))
def test_every_layer_finds_its_experts_in_every_step(shape: tuple[int, int, bool], steps: int) -> None:
    num_layers, depth, late = shape
    ring, _ = simulate(num_layers, depth, late, [list(range(num_layers))] * steps)
    assert ring.late_fills == 0


@given(shapes, st.data())
def test_steps_that_are_cut_short_or_out_of_order(shape: tuple[int, int, bool], data: st.DataObject) -> None:
    num_layers, depth, late = shape
    layers = st.lists(st.integers(0, num_layers - 1), max_size=12)
    simulate(num_layers, depth, late, data.draw(st.lists(layers, max_size=4)))


@pytest.mark.parametrize(("num_layers", "depth"), [(2, 1), (5, 1), (5, 2), (5, 3), (6, 2), (6, 3)])
def test_a_step_does_not_start_cold(num_layers: int, depth: int) -> None:
    ring, engine = simulate(num_layers, depth, False, [list(range(num_layers))] * 2)
    # The first step fetches the first `depth` layers up front; every release fetches one more, and a slot that
    # one layer uses alone (5 layers, 3 slots: slot 2) is never refetched.
    alone = sum(1 for slot in range(depth) if len(range(slot, num_layers, depth)) == 1)
    per_step = num_layers - alone
    assert engine.fills == depth + 2 * per_step
    assert ring.copied_bytes == engine.fills


@pytest.mark.parametrize("depth", [4, 7])
def test_with_a_slot_for_every_layer_everything_is_fetched_once(depth: int) -> None:
    _, engine = simulate(4, depth, False, [list(range(4))] * 5)
    assert engine.fills == 4


@pytest.mark.parametrize("slow", ["copy", "compute"])
def test_real_threads_with_one_slow_side(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 steps with poisoned slots: neither stale nor half-copied experts may be seen."""
    num_layers, depth, size = 5, 2, 4096
    sources = [torch.full((size,), layer + 1, dtype=torch.uint8) for layer in range(num_layers)]
    slots = [torch.full((size,), 255, dtype=torch.uint8) for _ in range(depth)]
    plans = [
        [(slots[layer % depth][:2048], sources[layer][:2048]), (slots[layer % depth][2048:], sources[layer][2048:])]
        for layer in range(num_layers)
    ]
    engine = HostCopyEngine(10.0)
    if slow == "copy":
        real = torch.Tensor.copy_

        def slow_copy(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            time.sleep(0.0002)
            return real(self, source)

        monkeypatch.setattr(torch.Tensor, "copy_", slow_copy)
    ring = Prefetcher(engine, plans, [size] * num_layers, depth)
    for _ in range(200):
        ring.prime()
        for layer in range(num_layers):
            ring.wait(layer)
            if slow == "compute":
                time.sleep(0.0002)
            assert slots[layer % depth].eq(layer + 1).all()
            slots[layer % depth].fill_(255)
            ring.release(layer)
    engine.close()
