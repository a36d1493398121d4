"""Kernels that read a peer's experts in place: what to measure, and how, with PyTorch and mapped memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from .profile import ReadPoint
from .shape import ModelShape

# A few rows for each expert: fewer than a tile, so that weights are read once, and reading them is what takes time.
ROWS_PER_EXPERT = (4, 32)
LEAST_OF_OWN = 0.9  # timings vary


class ReadBench(Protocol):
    """GPUs that can multiply with weights in a peer's memory."""

    devices: int
    weight_bytes: int

    def reaches(self, reader: int, source: int) -> bool:
        """Whether ``reader`` can read the memory of ``source``."""
        ...

    def seconds(self, reader: int, source: int, rows_per_expert: int) -> float:
        """Seconds of one grouped product on ``reader`` whose ``weight_bytes`` bytes lie on ``source``, or on itself."""
        ...


def measure_reads(bench: ReadBench) -> list[ReadPoint]:
    """Every ordered pair of GPUs that reach each other; nothing with one GPU.

    Raises:
        OSError: a peer's memory was read faster than a GPU's own, so it was not read at all.
    """
    points = []
    for reader in range(bench.devices):
        sources = [source for source in range(bench.devices) if source != reader and bench.reaches(reader, source)]
        for rows in ROWS_PER_EXPERT if sources else ():
            own = bench.seconds(reader, reader, rows)
            for source in sources:
                seconds = bench.seconds(reader, source, rows)
                if seconds < LEAST_OF_OWN * own:
                    raise OSError(f"GPU {reader} seemed to read GPU {source}'s memory faster than its own")
                points.append(ReadPoint(reader, source, rows, bench.weight_bytes / seconds))
    return points


class TorchReadBench:
    """The GPUs of this machine: PyTorch's grouped product on the bf16 weights of one layer's gate and up projections.

    The weights are mapped from the peer as the runtime maps them (``memory.cuda_vmm``), in one process.
    """

    def __init__(self, torch: Any, model: ModelShape, timed: Callable[[Callable[[], Any]], float]) -> None:
        self._torch = torch
        self._model = model
        self._timed = timed
        self.devices = torch.cuda.device_count()
        self.weight_bytes = model.experts * model.hidden * 2 * model.moe_intermediate * 2

    def reaches(self, reader: int, source: int) -> bool:
        """Peer access, as the driver says."""
        return bool(self._torch.cuda.can_device_access_peer(reader, source))

    def seconds(self, reader: int, source: int, rows_per_expert: int) -> float:
        """See ``ReadBench``.

        Raises:
            OSError: the driver refused to make or to map memory.
        """
        torch, m = self._torch, self._model
        with torch.cuda.device(reader), self._weights(reader, source) as weights:
            ends = torch.arange(1, m.experts + 1, device=f"cuda:{reader}", dtype=torch.int32) * rows_per_expert
            rows = torch.zeros(m.experts * rows_per_expert, m.hidden, device=f"cuda:{reader}", dtype=torch.bfloat16)
            product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
            return self._timed(lambda: product(rows, weights, offs=ends))

    @contextmanager
    def _weights(self, reader: int, source: int) -> Iterator[Any]:
        """``[experts, hidden, 2 intermediate]`` zeros in ``source``'s memory, mapped for ``reader``."""
        from sglang_dwdp.memory.cuda import CudaMemory

        torch, m = self._torch, self._model
        with ExitStack() as undo:
            owner, user = CudaMemory(source), CudaMemory(reader)
            page = max(owner.page_bytes, user.page_bytes)
            whole = -(-self.weight_bytes // page) * page
            block = owner.create(whole)
            undo.callback(block.close)
            pages = user.reserve(whole)
            undo.callback(pages.close)
            pages.map(0, block)
            before = torch.cuda.memory_allocated(reader)
            raw = pages.tensor(self.weight_bytes)
            if torch.cuda.memory_allocated(reader) > before:
                raise OSError("PyTorch copied the peer's memory instead of mapping it")
            raw.zero_()
            yield raw.view(torch.bfloat16).view(m.experts, m.hidden, 2 * m.moe_intermediate)
            torch.cuda.synchronize(reader)
