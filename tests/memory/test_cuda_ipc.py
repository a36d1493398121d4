"""CUDA IPC between processes (a handle cannot be opened by the process that made it); one GPU is enough."""

from __future__ import annotations

import multiprocessing
import uuid
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.runtime import DwdpRuntime
from tests.ranks import CUDA_IPC, PlainLayer, checkpoint, equal, forward, open_resources

pytestmark = pytest.mark.gpu(3)

TAILS = {"w13_weight": (640, 400), "w2_weight": (400, 320), "scale": (3,), "large": (2000,)}


def _rank(rank: int, size: int, name: str, rounds: int, results: Any) -> None:
    """In a process of its own: set up, three forwards, close, several times."""
    full = checkpoint(3, 7, TAILS, "cuda:0")
    config = DwdpConfig(transport="cuda-ipc", replicate_below_kib=1, timeout_s=60)
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
        left.append(open_resources())
    results.put((rank, same, left[0] == left[-1]))


@pytest.mark.parametrize(("size", "rounds"), [(2, 3), (3, 1)])
def test_every_rank_sees_the_checkpoint_cuda_ipc(size: int, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    results, name = context.Queue(), uuid.uuid4().hex
    ranks = [context.Process(target=_rank, args=(rank, size, name, rounds, results)) for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        assert sorted(results.get(timeout=120) for _ in ranks) == [(rank, True, True) for rank in range(size)]
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
