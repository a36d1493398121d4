"""What a rank measures with: its GPU, or the host in its place, so that what ranks do together runs without GPUs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.multi.grouped import Routed, grouped_reference, grouped_triton
from sglang_dwdp.memory.base import CopyEngine, CopyList, Memory


class Bench(Protocol):
    """A rank's device.

    device: as torch names it.  name: as its driver names it.  least_s: seconds that a measurement should last.
    """

    device: str
    name: str
    memory: Memory
    least_s: float

    def engine(self, streams: int, batched: bool, prefer_overlap: bool) -> CopyEngine:
        """A copy engine of these settings."""

    def plain_memory(self) -> Memory | None:
        """Plain allocations that ranks can open, for comparison; None where there are none."""

    def run(self, engine: CopyEngine, copies: Any, fills: int, products: int) -> tuple[float, float]:
        """Fill `fills` times and multiply `products` times, both begun at once; seconds of either (0 for none)."""

    def grouped(self, x: torch.Tensor, weight: torch.Tensor, routed: Routed) -> torch.Tensor:
        """`[pairs, N]`: the grouped product of `grouped_reference`."""

    def timer(self, calls: list[Callable[[], Any]]) -> Callable[[], float]:
        """What runs all `calls` again and again, for `least_s`, and returns the mean seconds of one call."""


class GpuBench:
    """The GPU `index`. Products are bf16, 8192 x 8192."""

    least_s = 0.04

    def __init__(self, index: int) -> None:
        from sglang_dwdp.memory.cuda import CudaMemory

        self.memory: Memory = CudaMemory(index)
        self.device = f"cuda:{index}"
        self.name = torch.cuda.get_device_name(index)
        self._index = index
        self._matrix = torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16)
        self._product = torch.empty_like(self._matrix)

    def engine(self, streams: int, batched: bool, prefer_overlap: bool) -> CopyEngine:
        from sglang_dwdp.memory.cuda_copy import CudaCopyEngine

        return CudaCopyEngine(self._index, streams, batched=batched, prefer_overlap=prefer_overlap)

    def plain_memory(self) -> Memory | None:
        from sglang_dwdp.memory.cuda_ipc import CudaIpcMemory

        return CudaIpcMemory(self._index)

    def run(self, engine: CopyEngine, copies: Any, fills: int, products: int) -> tuple[float, float]:
        start, filled, first, last = (torch.cuda.Event(enable_timing=True) for _ in range(4))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._index)
        start.record()
        for _ in range(fills):
            engine.fill(copies, start, filled)
        first.record()
        for _ in range(products):
            torch.mm(self._matrix, self._matrix, out=self._product)
        last.record()
        torch.cuda.synchronize(self._index)
        copying = start.elapsed_time(filled) / 1e3 if fills else 0.0
        return copying, first.elapsed_time(last) / 1e3 if products else 0.0

    def grouped(self, x: torch.Tensor, weight: torch.Tensor, routed: Routed) -> torch.Tensor:
        return grouped_triton(x, weight, routed)

    def timer(self, calls: list[Callable[[], Any]]) -> Callable[[], float]:
        for call in calls:  # compiles
            call()
        torch.cuda.synchronize(self._index)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]

        def replay(times: int) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(times):
                graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / times

        replay(2)
        times = min(5000, max(3, math.ceil(self.least_s / replay(5))))
        return lambda: replay(times) / len(kept)


class HostBench:
    """The host. Its figures mean nothing but that the code runs."""

    device = "cpu"
    name = "CPU"
    least_s = 0.0

    def __init__(self) -> None:
        from sglang_dwdp.memory.host import HostMemory

        self.memory: Memory = HostMemory()
        self._matrix = torch.ones(64, 64)

    def engine(self, streams: int, batched: bool, prefer_overlap: bool) -> CopyEngine:
        return self.memory.copy_engine(60.0)

    def plain_memory(self) -> Memory | None:
        return None

    def run(self, engine: CopyEngine, copies: CopyList, fills: int, products: int) -> tuple[float, float]:
        released, filled = engine.event(), engine.event()
        start = time.perf_counter()
        for _ in range(fills):
            engine.fill(copies, released, filled)
        for _ in range(products):
            self._matrix @ self._matrix
        middle = time.perf_counter()
        engine.wait(filled)
        return time.perf_counter() - start if fills else 0.0, middle - start if products else 0.0

    def grouped(self, x: torch.Tensor, weight: torch.Tensor, routed: Routed) -> torch.Tensor:
        return grouped_reference(x, weight, routed)

    def timer(self, calls: list[Callable[[], Any]]) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return measure
