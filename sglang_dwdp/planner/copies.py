"""Copies between GPUs, alone and under compute: what to measure, and how, with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .profile import ALL_PEERS, CopyPoint

BLOCK = 1 << 30  # bytes of one copy: long enough that launching costs nothing
COPIES = 10
PRODUCTS = 40
OVERLAP = 0.8  # of the longer activity that the shorter one is to last, so that it always has company


class CopyBench(Protocol):
    """GPUs that can be told to copy and to compute at once."""

    devices: int

    def reaches(self, reader: int, source: int) -> bool:
        """Whether ``reader`` can copy from ``source`` without passing through the host."""
        ...

    def run(self, reader: int, sources: Sequence[int], copies: int, products: int) -> tuple[float, float]:
        """Copy ``BLOCK`` bytes from each source ``copies`` times, and run ``products`` equal products meanwhile.

        Returns:
            (seconds of all copies, seconds of all products); 0 for what was not asked for.
        """
        ...


def jobs(bench: CopyBench) -> list[tuple[int, tuple[int, ...]]]:
    """(reader, sources): every ordered pair, then every reader from all its peers at once.

    One GPU copies within itself. Pairs that do not reach each other are left out.
    """
    if bench.devices == 1:
        return [(0, (0,))]
    ranks = range(bench.devices)
    peers = {reader: [p for p in ranks if p != reader and bench.reaches(reader, p)] for reader in ranks}
    found = [(reader, (peer,)) for reader in ranks for peer in peers[reader]]
    return found + [(reader, tuple(peers[reader])) for reader in ranks if len(peers[reader]) > 1]


def measure_copies(bench: CopyBench) -> list[CopyPoint]:
    """Every job alone, then its products beside copies that outlast them, then the other way round."""
    points = []
    for reader, sources in jobs(bench):
        moved = BLOCK * len(sources)
        bench.run(reader, sources, 2, 5)  # warms up
        alone = bench.run(reader, sources, COPIES, 0)[0] / COPIES
        product = bench.run(reader, sources, 0, PRODUCTS)[1] / PRODUCTS
        few_products = max(1, int(OVERLAP * COPIES * alone / product))
        slowed = bench.run(reader, sources, COPIES, few_products)[1] / few_products
        few_copies = max(1, int(OVERLAP * PRODUCTS * product / alone))
        under = bench.run(reader, sources, few_copies, PRODUCTS)[0] / few_copies
        peer = sources[0] if len(sources) == 1 else ALL_PEERS
        points.append(CopyPoint(peer, moved / alone, moved / under, slowed / product, device=reader))
    return points


class TorchCopyBench:
    """The GPUs of this machine. Products are bf16, 8192 x 8192; each source has a stream of its own.

    PyTorch issues a copy between GPUs on the source's stream, the runtime on the reader's; both are
    work of copy engines over the same link.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.devices = torch.cuda.device_count()
        self._sources: dict[int, Any] = {}
        self._reader = -1

    def reaches(self, reader: int, source: int) -> bool:
        """Peer access, as the driver says."""
        return bool(self._torch.cuda.can_device_access_peer(reader, source))

    def _prepare(self, reader: int, sources: Sequence[int]) -> None:
        torch = self._torch
        for source in sources:
            if source not in self._sources:
                self._sources[source] = torch.empty(BLOCK, dtype=torch.uint8, device=f"cuda:{source}")
        if reader != self._reader:
            self._reader = reader
            device = f"cuda:{reader}"
            self._targets: list[Any] = []
            self._streams: list[Any] = []
            self._matrix = torch.randn(8192, 8192, device=device).bfloat16()
        while len(self._targets) < len(sources):
            self._targets.append(torch.empty(BLOCK, dtype=torch.uint8, device=f"cuda:{reader}"))
            self._streams.append(torch.cuda.Stream(f"cuda:{reader}"))

    def run(self, reader: int, sources: Sequence[int], copies: int, products: int) -> tuple[float, float]:
        """See ``CopyBench``. Copies that end last count for all."""
        torch = self._torch
        self._prepare(reader, sources)
        with torch.cuda.device(reader):
            torch.cuda.synchronize()
            marks = []
            for source, target, stream in zip(sources, self._targets, self._streams, strict=False):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with torch.cuda.stream(stream):
                    begin.record()
                    for _ in range(copies):
                        target.copy_(self._sources[source], non_blocking=True)
                    end.record()
                marks.append((begin, end))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(products):
                self._matrix @ self._matrix
            end.record()
            torch.cuda.synchronize()
            first = marks[0][0]
            copying = max(first.elapsed_time(last) for _, last in marks) / 1e3 if copies else 0.0
            return copying, begin.elapsed_time(end) / 1e3 if products else 0.0
