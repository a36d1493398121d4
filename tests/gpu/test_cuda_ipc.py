"""CUDA IPC between processes (a handle cannot be opened by the process that made it); one GPU is enough."""

from __future__ import annotations

import multiprocessing
import uuid
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.experts import layer as expert_layer
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import CUDA_IPC, GPU_TABLES, PlainLayer, checkpoint, equal, forward, gpu_bytes, open_resources

pytestmark = pytest.mark.gpu(3)

# Three layers' shards are far more than what the driver keeps for itself, so what is not freed is seen.
TAILS = {"w13_weight": (4096, 1025), "w2_weight": (400, 320), "scale": (3,), "large": (2000,)}


def _rank(rank: int, size: int, name: str, rounds: int, results: Any, all_closed: Any) -> None:
    """In a process of its own: set up, three forwards, close, several times."""
    full = checkpoint(3, 7, TAILS, "cuda:0")
    expert_layer.REPLICATE_BELOW_BYTES = 1 << 10  # "large" is shared, "scale" is replicated
    config = DwdpConfig(transport="cuda-ipc", timeout_s=60)
    left = []
    same = True
    for index in range(rounds):
        runtime = DwdpRuntime(config, CUDA_IPC.memory(), rank, size)
        layers = [PlainLayer(3 * i + 1, experts, rank, size) for i, experts in enumerate(full)]
        runtime.setup(layers, f"{name}.{index}")
        for tokens in (1000, 1, 1000):
            same &= equal(forward(runtime, layers, tokens), full)
        report = runtime.report()
        same &= report["direct_forwards"] == 0 and report["staged_forwards"] == 3 and report["late_fills"] == 0
        runtime.close()
        torch.cuda.empty_cache()
        all_closed.wait(60)
        left.append(open_resources())
        all_closed.wait(60)
    results.put((rank, same, left[0] == left[-1]))


@pytest.mark.parametrize(("size", "rounds"), [(2, 3), (3, 2)])
def test_every_rank_sees_the_checkpoint_cuda_ipc(size: int, rounds: int) -> None:
    """Memory that a peer may still copy from is given back when its process ends."""
    before = gpu_bytes()
    context = multiprocessing.get_context("spawn")
    results, name = context.Queue(), uuid.uuid4().hex
    all_closed = context.Barrier(size)
    ranks = [
        context.Process(target=_rank, args=(rank, size, name, rounds, results, all_closed)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        assert sorted(results.get(timeout=120) for _ in ranks) == [(rank, True, True) for rank in range(size)]
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    assert gpu_bytes() - before < GPU_TABLES
