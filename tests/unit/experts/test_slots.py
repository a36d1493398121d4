"""The ring of slots, against a model of a compute stream and two copy streams that run as early, or as late, as events
allow."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.experts.slots import Prefetcher
from sglang_dwdp.memory.base import CopyList, Event
from sglang_dwdp.memory.host import HostCopyEngine

Operation = Callable[[], None]
STREAMS = ("copy 0", "copy 1", "compute")
Order = tuple[Sequence[str], str]  # the eager streams, and the one that runs first at the end


class ModelEvent:
    """As the driver's: recorded by the host any number of times, reached by a stream as often, later."""

    def __init__(self) -> None:
        self.recorded = 0
        self.reached = 0

    def record(self) -> Operation:
        """What a stream does when it comes to a record that the host makes now."""
        self.recorded += 1
        return lambda: setattr(self, "reached", self.reached + 1)

    def passed(self) -> Callable[[], bool]:
        """Whether a wait that the host makes now lets its stream go on."""
        needed = self.recorded
        return lambda: self.reached >= needed


class ModelEngine:
    """Streams that work through what the host has enqueued, in the worst order that events allow.

    eager: the streams that run as soon as they can; the others not before the host is done.  first: which one runs
    first then, wherever it can.
    """

    def __init__(self, apply: Callable[[CopyList, int], None], eager: Sequence[str], first: str) -> None:
        self.apply, self.eager, self.first = apply, eager, first
        self.streams: dict[str, deque[tuple[Callable[[], bool], Operation]]] = {name: deque() for name in STREAMS}
        self.fills = 0

    def event(self) -> Event:
        return ModelEvent()

    def record(self, event: ModelEvent) -> None:
        self.compute(event.record())

    def prepare(self, copies: CopyList) -> CopyList:
        return copies

    def fill(self, copies: CopyList, after: ModelEvent, done: ModelEvent) -> None:
        self.fills += 1
        passed, reach, joined = after.passed(), done.record(), ModelEvent()
        join = joined.record()
        self._enqueue("copy 0", passed, lambda: self.apply(copies, 0))
        self._enqueue("copy 1", passed, lambda: self.apply(copies, 1))
        self._enqueue("copy 1", lambda: True, join)
        self._enqueue("copy 0", joined.passed(), reach)

    def wait(self, done: ModelEvent) -> None:
        self._enqueue("compute", done.passed(), lambda: None)

    def compute(self, operation: Operation) -> None:
        """The model's own work on the compute stream."""
        self._enqueue("compute", lambda: True, operation)

    def exposed_s(self) -> float:
        return 0.0

    def take_waits(self) -> list[float]:
        return []

    def close(self) -> None:
        while self._step(sorted(self.streams, key=lambda name: name != self.first)):
            pass
        assert not any(self.streams.values()), "the streams wait for each other"

    def _enqueue(self, stream: str, may: Callable[[], bool], operation: Operation) -> None:
        self.streams[stream].append((may, operation))
        while self._step(self.eager):
            pass

    def _step(self, names: Sequence[str]) -> bool:
        for name in names:
            if self.streams[name] and self.streams[name][0][0]():
                self.streams[name].popleft()[1]()
                return True
        return False


def simulate(
    num_layers: int, depth: int, order: Order, steps: list[list[int]], cut: Sequence[int] = (), copies: int = 0
) -> tuple[Prefetcher, ModelEngine]:
    """Run steps (lists of layers in order); every layer must find its own experts, from wait to release.

    cut: steps whose last layer runs, but is not released, as where an exception ends a forward.
    copies: how often all layers are copied before the first step.
    """
    used = min(depth, num_layers)
    holds, reading = [[-1, -1] for _ in range(used)], [False] * used

    def apply(copies: CopyList, stream: int) -> None:
        (layer,) = copies
        assert not reading[layer % used], "a slot was overwritten while it was read"
        # Half of a slot by each stream; which one differs between layers, as where one lacks a tensor.
        holds[layer % used][(stream + layer // used) % 2] = layer

    def begin(layer: int) -> None:
        assert holds[layer % used] == [layer, layer], "a slot was read before it was filled"
        reading[layer % used] = True

    def end(layer: int) -> None:
        assert holds[layer % used] == [layer, layer]
        reading[layer % used] = False

    engine = ModelEngine(apply, *order)
    ring = Prefetcher(engine, [[layer] for layer in range(num_layers)], [1] * num_layers, depth)
    for _ in range(copies):
        ring.copy_all()
    for number, step in enumerate(steps):
        ring.prime()
        for position, layer in enumerate(step, 1):
            ring.wait(layer)
            engine.compute(partial(begin, layer))
            engine.compute(partial(end, layer))
            if position < len(step) or number not in cut:
                ring.release(layer)
    engine.close()
    return ring, engine


EAGER: list[tuple[str, ...]] = [("copy 0", "copy 1"), ("copy 0",), ("copy 1",), ("compute",), ()]
ORDERS: list[Order] = [(eager, first) for eager in EAGER for first in STREAMS]
shapes = st.tuples(st.integers(1, 9), st.integers(1, 12), st.sampled_from(ORDERS))


@given(shapes, st.integers(1, 4))
def test_every_layer_finds_its_experts_in_every_step(shape: tuple[int, int, Order], steps: int) -> None:
    num_layers, depth, order = shape
    ring, _ = simulate(num_layers, depth, order, [list(range(num_layers))] * steps)
    assert ring.late_fills == 0


@given(shapes, st.data())
def test_steps_that_are_cut_short_or_out_of_order(shape: tuple[int, int, Order], data: st.DataObject) -> None:
    num_layers, depth, order = shape
    layers = st.lists(st.integers(0, num_layers - 1), max_size=12)
    steps = data.draw(st.lists(layers, max_size=4))
    cut = data.draw(st.lists(st.integers(0, 3), max_size=4))
    simulate(num_layers, depth, order, steps, cut)


@pytest.mark.parametrize("order", ORDERS)
def test_a_late_fill_waits_for_the_one_that_nobody_waited_for(order: Order) -> None:
    ring, _ = simulate(2, 1, order, [[1, 0]])  # 0 was fetched ahead, and 1 comes
    assert ring.late_fills == 1


@pytest.mark.parametrize("call", ["prime", "wait", "release"])
def test_a_fill_that_could_not_be_enqueued_is_made_again(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ModelEngine(lambda _copies, _stream: None, *ORDERS[0])
    ring = Prefetcher(engine, [[0], [1], [2]], [1] * 3, 2)
    if call != "prime":
        ring.prime()
    fails = {"prime": ring.prime, "wait": partial(ring.wait, 2), "release": partial(ring.release, 0)}[call]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "fill", lambda *_arguments: (_ for _ in ()).throw(OSError("no memory")))
        with pytest.raises(OSError, match="no memory"):
            fails()
    before = engine.fills
    ring.wait(0 if call == "prime" else 2)
    assert engine.fills == before + 1


@pytest.mark.parametrize(("num_layers", "depth"), [(2, 1), (5, 1), (5, 2), (5, 3), (6, 2), (6, 3)])
def test_a_step_does_not_start_cold(num_layers: int, depth: int) -> None:
    ring, engine = simulate(num_layers, depth, ORDERS[0], [list(range(num_layers))] * 2)
    # The first step fetches the first `depth` layers up front; every release fetches one more, and a slot that
    # one layer uses alone (5 layers, 3 slots: slot 2) is never refetched.
    alone = sum(1 for slot in range(depth) if len(range(slot, num_layers, depth)) == 1)
    per_step = num_layers - alone
    assert engine.fills == depth + 2 * per_step
    assert ring.copied_bytes == engine.fills


@given(shapes, st.integers(1, 3))
def test_copies_without_forwards_are_those_of_forwards(shape: tuple[int, int, Order], copies: int) -> None:
    num_layers, depth, order = shape
    ring, engine = simulate(num_layers, depth, order, [[*range(num_layers)]], copies=copies)
    other, forwards = simulate(num_layers, depth, order, [[*range(num_layers)]] * (copies + 1))
    assert engine.fills == forwards.fills
    assert (ring.late_fills, ring.depth) == (0, other.depth)


@pytest.mark.parametrize("depth", [4, 7])
def test_with_a_slot_for_every_layer_everything_is_fetched_once(depth: int) -> None:
    _, engine = simulate(4, depth, ORDERS[0], [list(range(4))] * 5)
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
