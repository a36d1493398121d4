"""Set-up, forwards and the end of a group, with real shared memory and real copies."""

from __future__ import annotations

import errno
import math
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError, DwdpRuntimeError, DwdpSetupError
from sglang_dwdp.experts.layout import tensor_layout
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.memory.base import Block, Handle, Memory
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.host import HostMemory
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import (
    GPU_TABLES,
    KINDS,
    PATHS,
    UNMAPPED,
    Kind,
    PlainLayer,
    checkpoint,
    equal,
    forward,
    gpu_bytes,
    open_resources,
    run_ranks,
)

TAILS = {"w13_weight": (24, 40), "w2_weight": (40, 12), "scale": (3,)}
# On a GPU a page has 2 MiB: there shards of several pages too, and pages that two ranks share.
TAILS_OF = {"cpu": TAILS, "cuda:0": {"w13_weight": (1280, 1000), "w2_weight": (400, 320), "scale": (3,)}}


@pytest.mark.parametrize("num_experts", [5, 8, 9, 10])
@pytest.mark.parametrize(("device", "page_bytes"), [("cpu", 4096), ("cuda:0", 2 << 20)])
def test_every_rank_has_memory_of_its_own_and_of_others(device: str, page_bytes: int, num_experts: int) -> None:
    """In the tests below, with 2 ranks; with 3 in all but the smallest."""
    nbytes = 2 * math.prod(TAILS_OF[device]["w13_weight"])
    for size in (2, 3) if num_experts > 5 else (2,):
        segments = tensor_layout(balanced(num_experts, size), nbytes, page_bytes).segments
        assert all(segment.nbytes for segment in segments)
        assert nbytes % page_bytes  # experts end within pages


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_experts", [8, 9, 10])
@pytest.mark.parametrize("view", ["auto", "direct", "staged"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_sees_the_checkpoint(kind: Kind, size: int, num_experts: int, view: Any) -> None:
    full = checkpoint(5, num_experts, TAILS_OF[kind.device], kind.device)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[bool]:
        return [equal(forward(runtime, layers, tokens), full) for tokens in (1000, 1, 1000, 1000, 1)]

    assert run_ranks(size, full, step, DwdpConfig(view=view, depth=2, timeout_s=20)) == [[True] * 5] * size
    assert open_resources()[1] == 0


@pytest.mark.parametrize("view", ["auto", "staged"])
def test_a_draft_models_layer_runs_in_forwards_of_its_own(view: Any) -> None:
    """In every order of forwards; a prefill, which the draft model follows, finds all of its experts fetched ahead."""
    full = checkpoint(5, 8, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        model, draft = layers[:-1], layers[-1:]

        def both(tokens: int) -> bool:
            return equal(forward(runtime, model, tokens) + forward(runtime, draft, tokens, draft=True), full)

        same = [both(1000) for _ in range(3)]
        late = runtime.report()["late_fills"]
        same += [equal(forward(runtime, model, tokens), full[:-1]) for tokens in (1000, 1)]
        same += [equal(forward(runtime, draft, tokens, draft=True), full[-1:]) for tokens in (1, 1000, 1000)]
        same.append(both(1000))
        report = runtime.report()
        with pytest.raises(DwdpRuntimeError, match="visited 0 of 1 MoE layers"):
            forward(runtime, [], 2, draft=True)
        with pytest.raises(DwdpRuntimeError, match="visited 1 of 4 MoE layers"):
            forward(runtime, draft, 2)
        return same, late, report["direct_forwards"] + report["staged_forwards"], report["forward_tokens"]

    config = DwdpConfig(view=view, depth=2, timeout_s=20)
    # Only the model's own forwards are counted.
    assert run_ranks(2, full, step, config, draft_layers=1) == [([True] * 9, 0, 6, 5001)] * 2


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("view", ["direct", "staged"])
@pytest.mark.parametrize("local_experts", [5, 7, 9, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_redundant_placement(
    kind: Kind, local_experts: int, view: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = (64, 80) if kind.device == "cpu" else (1280, 1000)
    full = checkpoint(3, 10, {"w13_weight": tail, "scale": (300,)}, kind.device)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[Any]:
        seen = [equal(forward(runtime, layers, tokens), full) for tokens in (1000, 1, 1000)]
        return [*seen, runtime.report()["local_experts"]]

    monkeypatch.setattr("sglang_dwdp.experts.layer.REPLICATE_BELOW_BYTES", 0)
    config = DwdpConfig(view=view, depth=2, local_experts=local_experts, timeout_s=20)
    before = open_resources()
    assert run_ranks(size, full, step, config) == [[True] * 3 + [local_experts]] * size
    if kind.device == "cpu":
        assert open_resources() == before


def test_redundant_experts_are_read_and_copied_by_nobody() -> None:
    full = checkpoint(3, 8, {"w1": (32, 64)})  # an expert is one page

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[Any]:
        runtime.begin_forward(1)
        runtime.count_reads(1, torch.arange(8))
        read = runtime.report()["bytes_read_in_place"]
        forward(runtime, layers, 1000)
        report = runtime.report()
        return [read, *(report[name] for name in ("bytes_copied", "stored_bytes", "slot_bytes"))]

    config = DwdpConfig(depth=3, local_experts=6, timeout_s=20)
    assert run_ranks(2, full, step, config) == [[2 * 4096, 3 * 2 * 4096, 3 * 6 * 4096, 3 * 2 * 4096]] * 2


def test_a_memory_budget_keeps_as_many_experts_as_fit() -> None:
    full = checkpoint(6, 8, {"w1": (32, 64)})  # 6 layers of 8 pages
    page_gib = 4096 / (1 << 30)

    def kept(pages: float) -> Any:
        config = DwdpConfig(depth=2, memory_gib=pages * page_gib, timeout_s=20)
        return run_ranks(2, full, lambda r, _l: (r.report()["local_experts"], r.report()["slot_bytes"] // 4096), config)

    # K experts of 6 layers, and 2 slots for the 8 - K others.
    assert kept(32) == [(4, 8)] * 2
    assert kept(35.9) == [(4, 8)] * 2
    assert kept(36) == [(5, 6)] * 2
    assert kept(48) == [(8, 0)] * 2
    for error in kept(31):
        assert isinstance(error, DwdpConfigError)
        assert "is too little: 4 experts of each layer and 2 slots take 0.00 GiB" in str(error)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("view", ["auto", "staged"])
def test_memory_that_cannot_be_mapped(view: Any, size: int) -> None:
    """As with CUDA IPC: every forward is staged, the rank's own experts too, and nothing stays open."""
    full = checkpoint(5, 10, TAILS)
    assert run_ranks(size, full, lambda _r, _l: None, memory=lambda _: UNMAPPED.memory()) == [None] * size
    before = open_resources()

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        seen = [equal(forward(runtime, layers, tokens), full) for tokens in (1000, 1, 1000)]
        report = runtime.report()
        return seen, report["direct_forwards"], report["staged_forwards"], report["late_fills"]

    config = DwdpConfig(view=view, transport="cuda-ipc", timeout_s=20)
    results = run_ranks(size, full, step, config, lambda _: UNMAPPED.memory())
    assert results == [([True] * 3, 0, 3, 0)] * size
    assert open_resources() == before


def test_blocks_of_replicated_tensors_are_freed_where_memory_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def held(replicate_below: int) -> Any:
        monkeypatch.setattr("sglang_dwdp.experts.layer.REPLICATE_BELOW_BYTES", replicate_below)
        full = checkpoint(2, 6, {"w1": (32, 64), "scale": (512,)})
        before = open_resources()[1]
        config = DwdpConfig(view="staged", timeout_s=20)
        barrier = threading.Barrier(2)

        def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
            barrier.wait()
            count = open_resources()[1] - before
            barrier.wait()
            return count, equal(forward(runtime, layers, 1), full)

        return run_ranks(2, full, step, config, lambda _: UNMAPPED.memory())[0]

    # Of each layer two blocks of weights, each open on both ranks, and a slot's block for each rank and each of the two
    # slots. Where scales are shared like weights they take as many.
    weights, replicated = held(0), held(1 << 20)
    assert weights[1]
    assert replicated[1]
    assert weights[0] == 2 * replicated[0]


def test_a_failure_at_every_call_with_memory_that_cannot_be_mapped() -> None:
    full = checkpoint(2, 5, TAILS)
    before = open_resources()
    runs = list(failing_runs(UNMAPPED, full, DwdpConfig(view="staged", timeout_s=20)))
    assert len(runs) > 20
    assert runs[-1] == ["ran", "ran"]
    for healthy, failed in runs[:-1]:
        assert "injected" in str(failed)
        assert "injected" in str(healthy)
    assert open_resources() == before


def test_handles_that_are_bytes_and_a_failure_at_every_call_with_them() -> None:
    """As in a group over hosts."""
    full = checkpoint(3, 5, TAILS)
    before = open_resources()
    step = lambda r, layers: [equal(forward(r, layers, n), full) for n in (1, 999)]  # noqa: E731
    assert run_ranks(3, full, step, memory=lambda _: PATHS.memory()) == [[True, True]] * 3
    runs = list(failing_runs(PATHS, full[:2], DwdpConfig(view="staged", timeout_s=20)))
    assert runs[-1] == ["ran", "ran"]
    for healthy, failed in runs[:-1]:
        assert "injected" in str(failed)
        assert "injected" in str(healthy)
    assert open_resources() == before


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(2, 4),
    num_experts=st.integers(4, 11),
    num_layers=st.integers(1, 4),
    depth=st.integers(1, 5),
    tail=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    min_slice_kib=st.sampled_from([4, 8, 2048]),
)
def test_any_shape(
    kind: Kind, size: int, num_experts: int, num_layers: int, depth: int, tail: tuple[int, int], min_slice_kib: int
) -> None:
    if kind.device != "cpu":
        tail = (tail[0] * 16, tail[1] * 16)  # pages are larger there
    full = checkpoint(num_layers, num_experts, {"w13_weight": tail, "w2_weight": tail[::-1]}, kind.device)
    config = DwdpConfig(view="staged", depth=depth, timeout_s=20)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MIN_SLICE_BYTES", "SHORT_SLICE_BYTES"):
            patch.setattr(f"sglang_dwdp.experts.layout.{name}", min_slice_kib << 10)
        results = run_ranks(
            size, full, lambda r, layers: [equal(forward(r, layers, 9), full) for _ in range(3)], config
        )
    assert results == [[True] * 3] * size


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_different_shapes_do_not_share_a_slots_memory(kind: Kind) -> None:
    shapes = ((2, 6, (640, 640)), (2, 7, (320, 960)), (1, 6, (640, 640)))
    full = [layer for n, experts, tail in shapes for layer in checkpoint(n, experts, {"w1": tail}, kind.device)]
    config = DwdpConfig(view="staged", depth=2, timeout_s=20)
    assert run_ranks(3, full, lambda r, layers: equal(forward(r, layers, 9), full), config) == [True] * 3


def test_what_the_copies_and_counters_say() -> None:
    full = checkpoint(3, 8, {"w1": (32, 64)})  # an expert is one page
    remote = 3 * 4 * 4096

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[Any]:
        forward(runtime, layers, 1)
        direct = runtime.report()
        forward(runtime, layers, 1000)
        return [direct, runtime.report()]

    for direct, staged in run_ranks(2, full, step, DwdpConfig(depth=3, timeout_s=20)):
        assert direct["bytes_copied"] == 0
        assert (direct["direct_forwards"], direct["staged_forwards"]) == (1, 0)
        assert staged["bytes_copied"] == remote  # with a slot for each layer, each is fetched once
        assert (staged["direct_forwards"], staged["staged_forwards"]) == (1, 1)
        assert (staged["forward_tokens"], staged["late_fills"]) == (1001, 0)
        assert staged["stored_bytes"] == remote
        assert staged["slot_bytes"] == remote


def test_forwards_and_waits_of_the_start_are_no_request_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[Any]:
        exposed = iter((1.5, 1.5, 1.75))
        monkeypatch.setattr(runtime._engine, "exposed_s", lambda: next(exposed))
        forward(runtime, layers, 1000)
        before = runtime.report()
        runtime.reset_counts()
        return [(report["staged_forwards"], report["exposed_copy_s"]) for report in (before, runtime.report())]

    full = checkpoint(3, 8, {"w1": (32, 64)})
    assert run_ranks(2, full, step, DwdpConfig(timeout_s=20)) == [[(1, 1.5), (0, 0.25)]] * 2


def test_an_exchange_step_is_a_kind_of_its_own() -> None:
    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[Any]:
        for is_joint in (True, False):
            runtime.in_exchange_step = is_joint
            forward(runtime, layers, 3)
        report = runtime.report()
        return [report[name] for name in ("joint_forwards", "exchanged_rows", "direct_forwards", "forward_tokens")]

    full = checkpoint(3, 8, {"w1": (32, 64)})
    assert run_ranks(2, full, step, DwdpConfig(timeout_s=20)) == [[1, 3, 1, 6]] * 2


def test_bytes_read_in_place_follow_the_routing() -> None:
    full = checkpoint(1, 8, {"w1": (32, 64)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> int:
        runtime.count_reads(1, torch.tensor([[0, 7]]))  # in no forward: the capture of a graph
        runtime.begin_forward(1)
        runtime.count_reads(1, torch.tensor([[0, 5], [0, 6], [-1, 1]]))
        runtime.begin_forward(1000)  # staged: nothing is read in place
        runtime.count_reads(1, torch.tensor([[0, 7]]))
        return runtime.report()["bytes_read_in_place"]

    assert run_ranks(2, full, step) == [2 * 4096, 2 * 4096]


def test_small_tensors_are_replicated_and_large_ones_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_dwdp.experts.layer.REPLICATE_BELOW_BYTES", 16 << 10)
    full = checkpoint(1, 8, {"w1": (32, 64), "small": (4,), "large": (1024,)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        return layers[0].tensors["small"].data_ptr(), runtime.report()["stored_bytes"], equal([layers[0].tensors], full)

    results = run_ranks(2, full, step)
    assert [(stored, same) for _, stored, same in results] == [(4 * 8192, True)] * 2
    assert results[0][0] != results[1][0]


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_forwards_layers_are_bound_to_direct_views_with_fixed_addresses(kind: Kind) -> None:
    """What a CUDA graph captures outside a forward must read memory that stays."""
    full = checkpoint(2, 8, {"w1": (32, 64)}, kind.device)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        before = [layer.tensors["w1"].data_ptr() for layer in layers]
        forward(runtime, layers, 1000)
        staged = [layer.tensors["w1"].data_ptr() for layer in layers]
        for layer in layers:
            runtime.wait(layer.layer_id)  # as a capture calls it, with no forward announced
        after = [layer.tensors["w1"].data_ptr() for layer in layers]
        return before == after and not set(before) & set(staged)

    assert run_ranks(2, full, step) == [True, True]


def test_a_forward_that_goes_past_the_runtime_is_noticed() -> None:
    full = checkpoint(2, 8, {"w1": (32, 64)})

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> None:
        runtime.begin_forward(7)
        runtime.end_forward(0)  # an idle batch has nothing to visit
        runtime.begin_forward(7)
        runtime.end_forward(7, replayed=True)  # a graph's replay does not call back
        runtime.begin_forward(7)
        runtime.wait(1)
        runtime.end_forward(7)

    for error in run_ranks(2, full, step):
        assert isinstance(error, DwdpRuntimeError)
        assert "a forward of 7 tokens visited 1 of 2 MoE layers" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_200_forwards_with_poisoned_slots(kind: Kind) -> None:
    page = kind.memory().page_bytes
    full = checkpoint(5, 8, {"w1": (32, page // 64)}, kind.device)  # an expert is one page

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        release = runtime.release

        def poisoned(layer_id: int) -> None:
            layer = next(layer for layer in layers if layer.layer_id == layer_id)
            # Every page that is not this rank's own: those of its shard are shared with the direct view.
            own = layer.placement.shard(runtime.rank)
            layer.tensors["w1"][: own.start].fill_(float("nan"))
            layer.tensors["w1"][own.stop :].fill_(float("nan"))
            release(layer_id)

        runtime.release = poisoned  # type: ignore[method-assign]
        return all(equal(forward(runtime, layers, 9), full) for _ in range(200))

    assert run_ranks(2, full, step, DwdpConfig(view="staged", timeout_s=20)) == [True, True]


class FailingMemory:
    """Memory whose n-th call fails, whatever it is."""

    def __init__(self, memory: Memory, fail_at: int) -> None:
        self._memory = memory
        self.left = fail_at
        self.page_bytes, self.transport = memory.page_bytes, memory.transport
        self.create, self.export = self._failing(memory.create), self._failing(memory.export)
        self.finish_writes, self.trim = self._failing(memory.finish_writes), self._failing(memory.trim)
        self.maps = memory.maps

    @property
    def held_bytes(self) -> int:
        return self._memory.held_bytes

    def copy_engine(self, timeout_s: float) -> Any:
        engine: Any = self._memory.copy_engine(timeout_s)
        engine.prepare = self._failing(engine.prepare)
        return engine

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOMEM, "injected")

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any) -> Any:
            self._step()
            return call(*args)

        return stepped

    def import_handle(self, handle: Handle, nbytes: int) -> Block:
        block = self._memory.import_handle(handle, nbytes)  # takes the descriptor over, also where it fails
        try:
            self._step()
        except OSError:
            block.close()
            raise
        return block

    def reserve(self, nbytes: int) -> Any:
        self._step()
        pages: Any = self._memory.reserve(nbytes)
        pages.map, pages.protect = self._failing(pages.map), self._failing(pages.protect)
        return pages


def failing_runs(kind: Kind, full: Any, config: DwdpConfig) -> Iterator[list[Any]]:
    for fail_at in range(1, 1000):
        memories = [kind.memory(), FailingMemory(kind.memory(), fail_at)]
        layers = [[PlainLayer(i, experts, rank, 2) for i, experts in enumerate(full)] for rank in (0, 1)]
        ended = run_ranks(2, full, lambda _r, _l: "ran", config, memories.__getitem__, layers.__getitem__)  # type: ignore[arg-type]
        # Errors without their frames, which hold the layers of both ranks.
        yield [type(end)(str(end)) if isinstance(end, Exception) else end for end in ended]
        # None is left that points into what was unmapped.
        bound = [tensor for own in layers for layer in own if layer.bound for tensor in layer.tensors.values()]
        assert not any(tensor.numel() for tensor in bound)
        if memories[1].left > 0:
            return


@pytest.mark.parametrize("view", ["direct", "staged"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_injected_failure_at_every_call_of_set_up(kind: Kind, view: Any) -> None:
    """Both ranks hear of it, with rank, layer, tensor and cause, and everything is as it was."""
    full = checkpoint(2, 5, TAILS_OF[kind.device], kind.device)
    config = DwdpConfig(view=view, timeout_s=20)
    run_ranks(2, full, lambda _r, _l: None, config)
    before, gpu_before = open_resources(), gpu_bytes()
    runs = list(failing_runs(kind, full, config))
    assert len(runs) > 20
    assert gpu_bytes() - gpu_before < GPU_TABLES
    assert runs[-1] == ["ran", "ran"]
    for healthy, failed in runs[:-1]:
        assert isinstance(failed, DwdpSetupError)
        assert re.search("rank 1, (start|layer|last steps)", str(failed))
        assert "injected" in str(failed)
        assert isinstance(healthy, DwdpSetupError)
        assert "injected" in str(healthy)
    assert open_resources() == before


@pytest.mark.parametrize("kind", KINDS)
def test_64_times_open_and_close(kind: Kind) -> None:
    full = checkpoint(1, 5, TAILS, kind.device)
    run_ranks(2, full, lambda _r, _l: None)
    before, gpu_before = open_resources(), gpu_bytes()
    for _ in range(64):
        assert run_ranks(2, full, lambda r, layers: equal(forward(r, layers, 1), full)) == [True, True]
    assert open_resources() == before
    assert gpu_bytes() - gpu_before < GPU_TABLES


def test_closing_twice_and_before_set_up() -> None:
    runtime = DwdpRuntime(DwdpConfig(), HostMemory(), 0, 2)
    runtime.close()
    runtime.close()


def layers_with(change: Callable[[int, list[PlainLayer]], None], full: Any) -> Callable[[int], list[PlainLayer]]:
    def make(rank: int) -> list[PlainLayer]:
        layers = [PlainLayer(i, experts, rank, 2) for i, experts in enumerate(full)]
        change(rank, layers)
        return layers

    return make


def test_experts_that_do_not_lie_one_after_another_are_unsupported_and_nothing_is_bound() -> None:
    full = checkpoint(2, 6, {"w1": (8, 8)})
    made = []

    def change(_rank: int, layers: list[PlainLayer]) -> None:
        layers[1].tensors["w1"] = layers[1].tensors["w1"].transpose(1, 2)
        made.extend(layers)

    for error in run_ranks(2, full, lambda _r, _l: None, layers_of=layers_with(change, full)):
        assert isinstance(error, DwdpConfigError)
        assert "layer 1, w1 (3, 8, 8), strides (64, 1, 8): the experts do not lie one after another" in str(error)
    assert not any(layer.bound for layer in made)


def test_a_shard_of_the_wrong_size_is_an_error() -> None:
    full = checkpoint(1, 6, {"w1": (8, 8)})

    def change(_rank: int, layers: list[PlainLayer]) -> None:
        layers[0].tensors["w1"] = torch.zeros(6, 8, 8)

    for error in run_ranks(2, full, lambda _r, _l: None, layers_of=layers_with(change, full)):
        assert isinstance(error, DwdpConfigError)
        assert "should have loaded 3 experts" in str(error)


def test_ranks_that_loaded_different_experts_are_told_where() -> None:
    full = checkpoint(2, 6, {"w1": (8, 8)})

    def change(rank: int, layers: list[PlainLayer]) -> None:
        if rank == 1:
            layers[1].tensors["w1"] = layers[1].tensors["w1"].float()

    for error in run_ranks(2, full, lambda _r, _l: None, layers_of=layers_with(change, full)):
        assert isinstance(error, DwdpSetupError)
        assert "loaded other experts" in str(error)
        assert "torch.float32" in str(error)


def test_ranks_that_loaded_the_same_tell_each_other_no_more_than_a_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    class Watched(Exchange):
        def all_gather(self, payload: bytes) -> list[bytes]:
            sent.append(payload)
            return super().all_gather(payload)

    monkeypatch.setattr("sglang_dwdp.runtime.Exchange", Watched)
    full = checkpoint(9, 6, {"w1": (8, 8)})
    assert run_ranks(2, full, lambda _r, _l: "ran") == ["ran", "ran"]
    assert max(map(len, sent)) == 32


def test_an_error_of_one_rank_only_reaches_the_other() -> None:
    full = checkpoint(1, 6, {"w1": (8, 8)})

    def change(rank: int, layers: list[PlainLayer]) -> None:
        if rank == 0:
            layers[0].tensors["w1"] = layers[0].tensors["w1"].transpose(1, 2)

    first, second = run_ranks(2, full, lambda _r, _l: None, layers_of=layers_with(change, full))
    assert isinstance(first, DwdpConfigError)
    assert "rank 0 failed: layer 0, w1" in str(second)
