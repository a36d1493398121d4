"""What a rank measures with: its GPU, or the host in its place, so that what ranks do together runs without GPUs."""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from typing import Any

import torch

from sglang_dwdp.memory.base import Memory
from sglang_dwdp.memory.handshake import Exchange

REP_MS = 200  # how long a measurement takes, so that those of several ranks lie beside each other


class Device:
    """The GPU `index`, or the host.

    Attributes:
        device: As torch names it.
        name: As its driver names it.
        memory: Its kind of shared memory.
    """

    def __init__(self, index: int | None) -> None:
        self.memory: Memory
        if index is None:
            from sglang_dwdp.memory.host import HostMemory

            self.memory, self.device, self.name = HostMemory(), "cpu", "CPU"
            return
        from sglang_dwdp.memory.cuda import CudaMemory

        torch.cuda.set_device(index)
        self.memory, self.device, self.name = CudaMemory(index), f"cuda:{index}", torch.cuda.get_device_name(index)

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median seconds of a call; on the host of one, which means nothing but that the code runs."""
        if self.device == "cpu":
            return timeit.timeit(call, number=1)
        from triton.testing import do_bench

        return float(do_bench(call, rep=REP_MS, return_mode="median")) / 1e3


def gathered(exchange: Exchange, value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    return [json.loads(answer) for answer in exchange.all_gather(json.dumps(value).encode())]


def together(exchange: Exchange, call: Callable[[], Any] | None) -> list[Any]:
    """What each rank measures while the others measure too, begun at the same time; None of ranks without a call."""
    exchange.barrier()
    return gathered(exchange, call() if call is not None else None)
