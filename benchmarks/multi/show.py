"""Tables of the parts, and targets with what was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from benchmarks.multi.copies import DEFAULT_KIB, WHOLE_KIB
from benchmarks.multi.reference import METHODS, RANKS, best

COPY_TARGET = 0.95

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """What the project aims at. reached: None where it was not measured."""

    what: str
    least: float
    reached: float | None

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return "not measured"
        return "met" if self.reached >= self.least else "missed"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def gb(bytes_per_s: float | None) -> str:
    """GB/s."""
    return "" if bytes_per_s is None else f"{bytes_per_s / 1e9:,.1f}"


def slowest(row: Result, key: str) -> float | None:
    """The least figure among the ranks that have one."""
    values = [figures[key] for figures in row["by_rank"] if key in figures]
    return min(values) if values else None


def copy_ratio(result: Result, row: Result) -> float | None:
    """A row's rate to that of one large peer copy: of the same pair, or one of the first pair's where it has none."""
    reference = result.get("reference") or []
    if not reference:
        return None
    rate = best(reference, row["reads"])
    if rate is None:  # ranks that share one GPU, or more than two at once
        rate = best(reference, [row["reads"][0]]) or best(reference, reference[0]["reads"])
    mine = slowest(row, "bytes_per_s")
    return mine / rate if mine and rate else None


def copy_targets(result: Result) -> list[Target]:
    """Staged copies, by the default slices, against one large peer copy: the worst pair, one way and both ways."""
    targets = []
    for kind in ("one way", "both ways"):
        ratios = [
            copy_ratio(result, row)
            for row in result.get("rows", ())
            if row["kind"] == kind and row["slice_kib"] == DEFAULT_KIB and row["engine"] == "default"
        ]
        known = [ratio for ratio in ratios if ratio is not None]
        name = f"staged copies to one large peer copy, {kind}, the worst pair"
        targets.append(Target(name, COPY_TARGET, min(known) if known else None))
    return targets


def copy_table(result: Result) -> Table:
    """Every row: slices, alone and under products."""
    columns = ("", "slices", "engine", "GB/s", "to one large copy", "GB/s under products", "products take")
    table = new_table("staged copies, the slowest rank", columns)
    for row in result.get("rows", ()):
        kib = row["slice_kib"]
        slices = "whole" if kib == WHOLE_KIB else f"{kib // 1024} MiB" + (" *" if kib == DEFAULT_KIB else "")
        ratio = copy_ratio(result, row)
        slow = [figures["product_slowdown"] for figures in row["by_rank"] if "product_slowdown" in figures]
        table.add_row(
            _who(row),
            slices,
            row["engine"],
            gb(slowest(row, "bytes_per_s")),
            "" if ratio is None else f"{ratio:.3f}",
            gb(slowest(row, "bytes_per_s_under")),
            f"{max(slow):.3f} x" if slow else "",
        )
    return table


def reference_table(result: Result) -> Table:
    """One large copy, by method."""
    columns = ("", "torch", "driver", "driver, a process for each rank")
    table = new_table("one large copy (1 GiB, plain allocations), GB/s of the slowest", columns)
    for row in result.get("reference") or ():
        rates = row["bytes_per_s"]
        who = ", ".join(f"{reader} ← {source}" for reader, source in row["reads"])
        table.add_row(who, *(gb(rates.get(method)) for method in (*METHODS, RANKS)))
    return table


def _who(row: Result) -> str:
    if row["kind"] == "all at once":
        return "all ← all peers"
    return ", ".join(f"{reader} ← {source}" for reader, source in row["reads"])


def read_rates(row: Result, key: str, name: str) -> float | None:
    """Bytes per second of experts as a kernel reads them (once for each block of rows), of the slowest rank."""
    rates = [mine["traffic"] / mine[key][name] for mine in row["by_rank"] if mine[key].get(name)]
    return min(rates) if rates else None


def read_table(result: Result) -> Table:
    """Rows by tokens; rates count an expert once for each block of rows that it multiplies."""
    rates = ("peers' GB/s, alone", "all at once", "resident GB/s", "time to resident", "… with all experts")
    columns = ("tokens", "MiB", "read", *rates, "bitwise")
    table = new_table("grouped product on peers' experts, read in place, the slowest rank", columns)
    for row in result.get("rows", ()):
        first = row["by_rank"][0]
        busy = [mine["together_s"] for mine in row["by_rank"]]
        table.add_row(
            f"{row['tokens']:,}",
            f"{first['bytes'] / 2**20:,.0f}",
            f"{first['traffic'] / first['bytes']:.1f} x",
            gb(read_rates(row, "alone_s", "peers")),
            gb(read_rates(row, "together_s", "peers")),
            gb(read_rates(row, "together_s", "resident")),
            f"{max(s['peers'] / s['resident'] for s in busy):.2f}",
            f"{max(s['view, all experts'] / s['resident, all experts'] for s in busy):.2f}",
            "equal" if all(mine["same"] for mine in row["by_rank"]) else "DIFFERENT",
        )
    return table


def planned_read_line(result: Result) -> str:
    """The planner's figure beside the best that was measured."""
    from sglang_dwdp.planner.gpus import gpu_of_device

    rates = [read_rates(row, "alone_s", "peers") for row in result.get("rows", ())]
    known = [rate for rate in rates if rate]
    gpu = gpu_of_device(result["devices"][0]) if result.get("devices") else None
    if not known:
        return "direct reads: nothing was measured"
    if gpu is None:
        return f"direct reads: at most {gb(max(known))} GB/s; the planner does not know this GPU"
    planned = gpu.direct_read_bandwidth
    return (
        f"direct reads: at most {gb(max(known))} GB/s measured, {gb(planned)} planned for {gpu.name} "
        f"(measured / planned {max(known) / planned:.2f})"
    )


def target_table(targets: Sequence[Target]) -> Table:
    """Met or missed, with the figure."""
    table = new_table("targets", ("", "at least", "reached", ""))
    for target in targets:
        reached = "" if target.reached is None else f"{target.reached:.3f}"
        table.add_row(target.what, f"{target.least:.2f}", reached, target.verdict)
    return table


def new_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
