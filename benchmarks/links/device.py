"""What a rank measures with: its GPU, or the host in its place, so that what ranks do together runs without GPUs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from sglang_dwdp.memory.base import CopyEngine, Memory
from sglang_dwdp.memory.handshake import Exchange

REP_MS = 200  # how long a measurement takes, so that those of several ranks lie beside each other


class Device(Protocol):
    """A rank's device.

    Attributes:
        device: As torch names it.
        name: As its driver names it.
        memory: Its kind of shared memory.
    """

    device: str
    name: str
    memory: Memory

    def copy_engine(self) -> CopyEngine:
        """A copy engine as a server has it."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median seconds of a call."""


class Gpu:
    """The GPU `index`."""

    def __init__(self, index: int) -> None:
        from sglang_dwdp.memory.cuda import CudaMemory

        torch.cuda.set_device(index)
        self.memory: Memory = CudaMemory(index)
        self.device = f"cuda:{index}"
        self.name = torch.cuda.get_device_name(index)

    def copy_engine(self) -> CopyEngine:
        return self.memory.copy_engine(60.0)

    def seconds(self, call: Callable[[], Any]) -> float:
        from triton.testing import do_bench

        return float(do_bench(call, rep=REP_MS, return_mode="median")) / 1e3


class Host:
    """The host. Its figures mean nothing but that the code runs."""

    device = "cpu"
    name = "CPU"

    def __init__(self) -> None:
        from sglang_dwdp.memory.host import HostMemory

        self.memory: Memory = HostMemory()

    def copy_engine(self) -> CopyEngine:
        return self.memory.copy_engine(60.0)

    def seconds(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def gathered(exchange: Exchange, value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    return [json.loads(answer) for answer in exchange.all_gather(json.dumps(value).encode())]


def together(exchange: Exchange, call: Callable[[], Any] | None) -> list[Any]:
    """What each rank measures while the others measure too, begun at the same time; None of ranks without a call."""
    exchange.barrier()
    return gathered(exchange, call() if call is not None else None)
