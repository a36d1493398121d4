"""Part a: staged copies between ranks, by the runtime's copy plan and copy engine, alone and under products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

from benchmarks.multi.bench import Bench
from benchmarks.multi.experts import WHOLE, Shape, SharedLayer
from benchmarks.multi.reference import copies_of_ranks, joined, large_copies
from benchmarks.multi.together import gathered, together
from sglang_dwdp.config import KIB
from sglang_dwdp.experts.layout import MIN_SLICE_BYTES
from sglang_dwdp.memory.base import CopyEngine
from sglang_dwdp.memory.handshake import Exchange

DEFAULT_KIB = MIN_SLICE_BYTES // KIB
SLICES_KIB = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
WHOLE_KIB = 0
# name: (streams, one driver call for a plan, the hint to leave multiprocessors alone)
ENGINES = {
    "default": (2, True, True),
    "1 stream": (1, True, True),
    "3 streams": (3, True, True),
    "4 streams": (4, True, True),
    "no overlap hint": (2, True, False),
    "single copies": (2, False, True),
}
LONGER = 1.5  # how much longer the company of what is timed is made to last
MANY = 4  # with more ranks, pairs are measured at two slice sizes only, and not under products

Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Case:
    """Who reads from whom at once, and how.

    reads: (reader, source); a source of -1 stands for all peers, by the whole plan.
    slice_kib: 0 for whole segments.  under: measure under products too.
    """

    kind: str
    reads: tuple[tuple[int, int], ...]
    slice_kib: int
    engine: str = "default"
    under: bool = False


def cases(size: int) -> list[Case]:
    """Every measurement for `size` ranks: ordered pairs one way, pairs both ways, then all ranks at once."""
    slices = (WHOLE_KIB, *SLICES_KIB) if size <= MANY else (WHOLE_KIB, DEFAULT_KIB)
    few = (WHOLE_KIB, DEFAULT_KIB)
    one_way = [((reader, source),) for reader, source in permutations(range(size), 2)]
    both_ways = [((low, high), (high, low)) for low, high in combinations(range(size), 2)]
    under = few if size <= MANY else ()
    found = [Case("one way", reads, kib, under=kib in under) for reads in one_way for kib in slices]
    found += [Case("both ways", reads, kib, under=kib in under) for reads in both_ways for kib in slices]
    everyone = tuple((rank, -1) for rank in range(size))
    if size > 2:
        found += [Case("all at once", everyone, kib, under=kib in few) for kib in (WHOLE_KIB, *SLICES_KIB)]
    of_engines = ("all at once", everyone) if size > 2 else ("both ways", both_ways[0])
    return found + [Case(*of_engines, DEFAULT_KIB, engine, under=True) for engine in ENGINES if engine != "default"]


class Meter:
    """One rank's measurements."""

    def __init__(self, bench: Bench, exchange: Exchange, layer: SharedLayer) -> None:
        self._bench, self._exchange, self._layer = bench, exchange, layer
        self._engines: dict[str, CopyEngine] = {}
        idle = self.engine("default")
        bench.run(idle, idle.prepare([]), 0, 5)
        exchange.barrier()
        self.product_s = max(1e-9, bench.run(idle, idle.prepare([]), 0, 30)[1] / 30)

    def engine(self, name: str) -> CopyEngine:
        """The copy engine of these settings, made on first use."""
        if name not in self._engines:
            self._engines[name] = self._bench.engine(*ENGINES[name])
        return self._engines[name]

    def measure(self, case: Case) -> dict[str, float]:
        """This rank's figures; none where it only is read from. All ranks call this together."""
        mine = [source for reader, source in case.reads if reader == self._layer.rank]
        figures: dict[str, float] = {}
        if not mine:
            for _ in range(3 if case.under else 1):
                together(self._exchange, None)
            return figures
        copies = self._layer.plan(case.slice_kib * KIB or WHOLE, mine[0] if mine[0] >= 0 else None)
        nbytes = sum(source.numel() for _, source in copies)
        engine = self.engine(case.engine)
        plan = engine.prepare(copies)

        def run(fills: int, products: int) -> tuple[float, float]:
            return self._bench.run(engine, plan, fills, products)

        run(2, 0)
        fill_s = max(1e-9, run(3, 0)[0] / 3)
        fills = max(2, math.ceil(self._bench.least_s / fill_s))
        alone = together(self._exchange, lambda: run(fills, 0)[0] / fills)
        figures |= {"bytes": nbytes, "copies": len(copies), "fill_s": alone, "bytes_per_s": nbytes / alone}
        if case.under:
            count = max(2, math.ceil(self._bench.least_s / self.product_s))
            longer = max(2, math.ceil(LONGER * count * self.product_s / alone))
            company = max(2, math.ceil(LONGER * fills * alone / self.product_s))
            # With copies and without in turn: clocks drift, and a product alone is only comparable with the next one.
            slowdown = together(self._exchange, lambda: run(longer, count)[1] / max(1e-9, run(0, count)[1]))
            under = together(self._exchange, lambda: run(fills, company)[0] / fills)
            figures |= {"product_slowdown": slowdown, "bytes_per_s_under": nbytes / under}
        return figures

    def plan_is_right(self, kib: int, engine: str) -> bool:
        """Whether a fill of a poisoned slot brings every byte."""
        copies = self._layer.plan(kib * KIB or WHOLE)
        for to, _ in copies:
            to.fill_(0xA5)
        self._bench.memory.finish_writes()
        made = self.engine(engine)
        self._bench.run(made, made.prepare(copies), 1, 0)
        self._bench.memory.finish_writes()
        return self._layer.staged_is_right()

    def close(self) -> None:
        """Stop the copy engines."""
        for engine in self._engines.values():
            engine.close()


def work(bench: Bench, exchange: Exchange, shape: Shape, save: Save, devices: int) -> dict[str, Any]:
    """All measurements of this rank; the same result on every rank. `save` gets what there is, time and again.

    devices: GPUs among the ranks.
    """
    result: dict[str, Any] = {"ranks": exchange.size, "rows": []}
    result["devices"] = gathered(exchange, bench.name)
    layer = SharedLayer(bench, exchange, shape)
    meter = Meter(bench, exchange, layer)
    try:
        result["direct_is_right"] = all(gathered(exchange, layer.direct_is_right()))
        tried = [(kib, "default") for kib in (WHOLE_KIB, *SLICES_KIB)] + [(DEFAULT_KIB, name) for name in ENGINES]
        result["staged_is_right"] = all(gathered(exchange, all([meter.plan_is_right(*one) for one in tried])))  # noqa: C419 (every rank tries all)
        save(result)
        alone = gathered(exchange, large_copies(devices) if exchange.rank == 0 else None)[0]
        result["reference"] = joined(alone, copies_of_ranks(bench, exchange))
        save(result)
        for case in cases(exchange.size):
            figures = gathered(exchange, meter.measure(case))
            row = {"kind": case.kind, "reads": case.reads, "slice_kib": case.slice_kib, "engine": case.engine}
            result["rows"].append({**row, "by_rank": figures})
            save(result)
    finally:
        meter.close()
    exchange.barrier()
    layer.close()
    return result
