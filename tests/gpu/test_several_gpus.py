"""Memory and views between GPUs, one for each rank. What one GPU cannot show: a view lies on several of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.experts import layout
from sglang_dwdp.memory.base import Memory
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import PlainLayer, checkpoint, equal, forward, run_ranks

pytestmark = pytest.mark.gpus(2)


def vmm(rank: int) -> Memory:
    from sglang_dwdp.memory.cuda import CudaMemory

    return CudaMemory(rank % torch.cuda.device_count())


@triton.jit
def _add_one(source: tl.tensor, target: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count) + 1, mask=at < count)


def _export(connection: socket.socket, rank: int, nbytes: int) -> None:
    """In a process of its own: a block on the GPU `rank`, that ends in the bytes 0, 1, 2 …"""
    memory = vmm(rank)
    block, pages = memory.create(nbytes), memory.reserve(nbytes)
    pages.map(0, block)
    values = pages.tensor(nbytes)
    values.copy_(torch.arange(nbytes, device=values.device).to(torch.uint8))
    memory.finish_writes()
    fd = memory.export(block)
    assert isinstance(fd, int)
    socket.send_fds(connection, [b"x"], [fd])
    connection.recv(1)  # the importer has written
    connection.send(bytes(values[:4].tolist()))
    time.sleep(120)


@pytest.mark.parametrize("here", [0, 1])
def test_a_view_that_begins_on_a_peers_gpu_is_this_gpus_tensor(here: int) -> None:
    """Kernels, copies and writes of this GPU through one tensor over both; a copy in its place would lose writes."""
    memory = vmm(here)
    nbytes = 4 * memory.page_bytes
    near, far = socket.socketpair(socket.AF_UNIX)
    exporter = multiprocessing.get_context("spawn").Process(target=_export, args=(far, 1 - here, nbytes))
    exporter.start()
    try:
        near.settimeout(60)
        _, fds, _, _ = socket.recv_fds(near, 1, 1)
        pages = memory.reserve(2 * nbytes)
        for offset, block in ((0, memory.import_handle(fds[0], nbytes)), (nbytes, memory.create(nbytes))):
            pages.map(offset, block)
            block.close()
        view = pages.tensor(2 * nbytes)
        assert view.device == torch.device("cuda", here)
        assert pages.tensor(2 * nbytes).data_ptr() == view.data_ptr()
        pattern = torch.arange(nbytes, device=view.device).to(torch.uint8)
        assert torch.equal(view[:nbytes], pattern)
        view[nbytes:].copy_(view[:nbytes])  # a copy between the GPUs
        expected = torch.cat([pattern, pattern])
        assert torch.equal(view, expected)
        result = torch.empty_like(view)
        graph = torch.cuda.CUDAGraph()
        grid = (triton.cdiv(len(view), 1024),)
        _add_one[grid](view, result, len(view), BLOCK=1024)  # Triton asks the driver for every pointer
        assert torch.equal(result, expected + 1)
        # A stream of this GPU: torch's own for captures belongs to the first GPU that captured.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            _add_one[grid](view, result, len(view), BLOCK=1024)
        view[:4].fill_(7)
        view[4:8].copy_(expected[:4])
        memory.finish_writes()
        near.send(b"x")
        assert near.recv(4) == b"\7\7\7\7"
        pages.protect(0, 2 * nbytes)
        assert exporter.pid is not None
        os.kill(exporter.pid, signal.SIGKILL)
        exporter.join()
        result.zero_()
        graph.replay()
        expected[:8] = torch.tensor([7] * 4 + [0, 1, 2, 3], dtype=torch.uint8)
        assert torch.equal(result, expected + 1)
        pages.close()
    finally:
        exporter.kill()


@pytest.mark.parametrize("transport", ["cuda-vmm", "cuda-ipc"])
@pytest.mark.parametrize("tokens", [1, 1000])
def test_every_rank_sees_all_experts_in_processes_of_their_own(transport: str, tokens: int) -> None:
    size = torch.cuda.device_count()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    name = f"several-gpus-{os.getpid()}-{transport}-{tokens}"
    ranks = [context.Process(target=_rank, args=(name, r, size, transport, tokens, answers)) for r in range(size)]
    for process in ranks:
        process.start()
    try:
        assert [answers.get(timeout=120) for _ in ranks] == ["equal"] * size
    finally:
        for process in ranks:
            process.join(20)
            process.kill()


def _rank(name: str, rank: int, size: int, transport: str, tokens: int, answers: Any) -> None:
    from sglang_dwdp.memory import memory_for

    try:
        layout.MIN_SLICE_BYTES = 2 << 20  # several slices of a peer
        config = DwdpConfig(timeout_s=60)
        runtime = DwdpRuntime(config, memory_for("cuda", rank, transport), rank, size)
        full = _full(f"cuda:{rank}")
        layers = [PlainLayer(i, experts, rank, size) for i, experts in enumerate(full)]
        runtime.setup(layers, name)
        same = all(equal(forward(runtime, layers, tokens), full) for _ in range(3))
        answers.put("equal" if same else "different")
        runtime.close()
    except Exception as error:  # noqa: BLE001  (it is the answer)
        answers.put(repr(error))


def _full(device: str) -> Any:
    # Experts are no whole number of pages: some lie on two GPUs. "scale" is replicated, "w…" and "big" are shared.
    return checkpoint(3, 13, {"w13_weight": (777, 1024), "w2_weight": (512, 999), "scale": (64,)}, device)


def _on_gpus(step: Callable[[DwdpRuntime, list[PlainLayer]], Any], config: DwdpConfig) -> list[Any]:
    """`step` on every rank, a thread with a GPU of its own."""
    size = torch.cuda.device_count()
    full = [_full(f"cuda:{rank}") for rank in range(size)]

    def layers_of(rank: int) -> list[PlainLayer]:
        return [PlainLayer(i, experts, rank, size) for i, experts in enumerate(full[rank])]

    def checked(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        assert torch.cuda.current_device() == runtime.rank  # making its memory made the GPU this thread's
        return equal(forward(runtime, layers, 1), full[runtime.rank]) and step(runtime, layers)

    return run_ranks(size, full[0], checked, config, vmm, layers_of)


@pytest.mark.parametrize("local_experts", [None, 9, 13])
def test_ranks_that_are_threads_and_keep_replicas(local_experts: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas come from several GPUs, and a forward copies the rest."""
    monkeypatch.setattr(layout, "MIN_SLICE_BYTES", 2 << 20)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        full = _full(f"cuda:{runtime.rank}")
        return all(equal(forward(runtime, layers, tokens), full) for tokens in (1000, 1, 1000, 1000))

    config = DwdpConfig(timeout_s=60, local_experts=local_experts)
    assert _on_gpus(step, config) == [True] * torch.cuda.device_count()


@pytest.mark.parametrize("mode", ["batch", "single"])
def test_the_copy_engine_brings_every_byte_from_a_peers_gpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MIN_SLICE_BYTES", 2 << 20)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        full = _full(f"cuda:{runtime.rank}")
        if mode == "single":  # as in a capture, or with a driver that has no batches
            prefetcher: Any = runtime.staged.prefetcher
            for plan in prefetcher._plans:
                for part in plan:
                    object.__setattr__(part, "batch", None)
        same = True
        for _ in range(20):
            same &= equal(forward(runtime, layers, 1000), full)
        return same

    assert _on_gpus(step, DwdpConfig(timeout_s=60)) == [True] * torch.cuda.device_count()
