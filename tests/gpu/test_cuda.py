"""GPU memory across processes, and in CUDA graphs; one GPU is enough."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import (
    CUDA,
    GPU_TABLES,
    PlainLayer,
    checkpoint,
    equal,
    forward,
    gpu_bytes,
    run_ranks,
    slow_copies,
    visit,
)

pytestmark = pytest.mark.gpu(2)


@pytest.fixture
def memory() -> Any:
    return CUDA.memory()


@pytest.fixture
def gpu_memory() -> Iterator[None]:
    """Nothing of the GPU's memory may be missing after the test."""
    before = gpu_bytes()
    yield
    assert gpu_bytes() - before < GPU_TABLES


def test_one_contiguous_tensor_over_two_blocks(memory: Any) -> None:
    page = memory.page_bytes
    low, high = memory.create(page), memory.create(2 * page)
    whole, alone = memory.reserve(3 * page), memory.reserve(2 * page)
    whole.map(0, low)
    whole.map(page, high)
    alone.map(0, high)
    for block in (low, high, low):
        block.close()  # mappings keep the memory, and closing twice is as good as once
    values = torch.randint(0, 255, (3 * page,), dtype=torch.uint8, device="cuda")
    whole.tensor(3 * page).copy_(values)
    assert torch.equal(alone.tensor(2 * page), values[page:])
    whole.protect(0, 3 * page)
    assert torch.equal(whole.tensor(3 * page), values)
    for pages in (whole, alone, whole):
        pages.close()
    with pytest.raises(ValueError, match="closed"):
        whole.tensor(page)


def test_what_does_not_fit_is_an_error_with_the_drivers_name_for_it(memory: Any) -> None:
    with pytest.raises(OSError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        memory.create(memory.page_bytes << 20)
    with pytest.raises(ValueError, match="whole pages"):
        memory.create(memory.page_bytes + 1)


def _export(connection: socket.socket, seed: int) -> None:
    memory = CUDA.memory()
    block = memory.create(8 * memory.page_bytes)
    pages = memory.reserve(block.nbytes)
    pages.map(0, block)
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(block.nbytes // 2, generator=generator, device="cuda", dtype=torch.bfloat16)
    pages.tensor(block.nbytes).view(torch.bfloat16).copy_(weight)
    torch.cuda.synchronize()
    socket.send_fds(connection, [b"x"], [memory.export(block)])
    time.sleep(120)


def test_a_replayed_graph_reads_a_killed_exporters_memory(memory: Any) -> None:
    """Bitwise the product with a resident copy, before and after SIGKILL of the process that made the memory."""
    here, there = socket.socketpair(socket.AF_UNIX)
    exporter = multiprocessing.get_context("spawn").Process(target=_export, args=(there, 5))
    exporter.start()
    _, fds, _, _ = socket.recv_fds(here, 1, 1)
    nbytes = 8 * memory.page_bytes
    block, pages = memory.import_handle(fds[0], nbytes), memory.reserve(nbytes)
    pages.map(0, block)
    block.close()
    pages.protect(0, nbytes)
    weight = pages.tensor(nbytes).view(torch.bfloat16).view(2048, -1)
    generator = torch.Generator("cuda").manual_seed(5)
    expected = torch.randn(nbytes // 2, generator=generator, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(16, 2048, device="cuda", dtype=torch.bfloat16)
    resident = x @ expected.view(2048, -1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product = x @ weight
    graph.replay()
    assert torch.equal(product, resident)
    assert exporter.pid is not None
    os.kill(exporter.pid, signal.SIGKILL)
    exporter.join()
    for _ in range(10):
        product.zero_()
        graph.replay()
        assert torch.equal(product, resident)
    pages.close()


@pytest.mark.parametrize("slow", ["copy", "compute"])
def test_200_forwards_with_one_slow_stream_and_poisoned_slots(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two streams run as far apart as their events allow, and no NaN of a released slot is ever seen."""
    monkeypatch.setattr("sglang_dwdp.experts.layout.MIN_SLICE_BYTES", 2 << 20)  # some for each stream
    page = CUDA.memory().page_bytes
    full = checkpoint(5, 8, {"w1": (32, page // 64)}, "cuda")  # an expert is one page
    sums = torch.stack([layer["w1"].float().sum() for layer in full])

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        assert [len(plan) for plan in runtime.staged.prefetcher._plans] == [2] * 5  # a part for each of two streams
        if slow == "copy":
            slow_copies(runtime)

        def read_and_poison(layer: PlainLayer) -> torch.Tensor:
            if slow == "compute":
                torch.cuda._sleep(200_000)
            weight = layer.tensors["w1"]
            total = weight.float().sum()
            own = layer.placement.shard(runtime.rank)
            weight[: own.start].fill_(float("nan"))
            weight[own.stop :].fill_(float("nan"))
            return total

        seen: list[torch.Tensor] = []
        for _ in range(200):
            seen += visit(runtime, layers, 1000, read_and_poison)
        return torch.equal(torch.stack(seen).view(200, 5), sums.expand(200, 5))

    # One rank at a time forwards (the other idles): two threads would take turns on the stream and hide a race.
    def first_rank_only(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        return step(runtime, layers) if runtime.rank == 0 else _idle(runtime)

    done: list[int] = []

    def _idle(_runtime: DwdpRuntime) -> bool:
        while not done:
            time.sleep(0.05)
        return True

    def watched(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        try:
            return first_rank_only(runtime, layers)
        finally:
            if runtime.rank == 0:
                torch.cuda.synchronize()
                done.append(1)

    assert run_ranks(2, full, watched, DwdpConfig(view="staged", depth=2)) == [True, True]


def test_graphs_read_direct_views_while_staged_forwards_run_between() -> None:
    full = checkpoint(3, 8, {"w1": (1024, 1024)}, "cuda")  # an expert is one page, so half of them are rank 1's

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        if runtime.rank:
            return True
        x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)

        def model() -> torch.Tensor:
            y = x
            for layer in layers:
                runtime.wait(layer.layer_id)
                y = torch.stack([y @ weight for weight in layer.tensors["w1"]]).sum(0) / 64
                runtime.release(layer.layer_id)
            return y

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            eager = model()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = model()
            ok = True
            for _ in range(5):
                forward(runtime, layers, 1000)
                captured.zero_()
                graph.replay()
                ok &= torch.equal(captured, eager)
            stream.synchronize()
        # A slot that still holds its layer is not filled again: two of three layers are copied in every forward.
        return ok and int(runtime.report()["bytes_copied"]) >= 5 * 2 * (8 << 20)

    assert run_ranks(2, full, step, DwdpConfig()) == [True, True]


def test_set_up_and_close_give_all_memory_back(gpu_memory: None) -> None:
    full = checkpoint(3, 8, {"w13_weight": (1024, 1024), "w2_weight": (1024, 512)}, "cuda")
    for _ in range(3):
        assert run_ranks(3, full, lambda r, layers: equal(forward(r, layers, 1000), full)) == [True] * 3
