"""What other readings and assumptions would give in place of those behind ``paper_tables.py``."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from benchmarks.paper_tables import GB200, MODEL, TABLE_3_PAIRS, ablation, context_server, mi355x
from sglang_dwdp.planner.calibrate import (
    PAPER_PRECISION,
    TABLE_1_DEP,
    calibrate,
    table_1_length_wait,
    table_1_rounds,
)
from sglang_dwdp.planner.dep import dep, expected_maximum, length_wait
from sglang_dwdp.planner.workload import mean_batch


def share_outside(ttft: float, tps: float, gpus: int) -> tuple[float, float]:
    """Share z of the in-flight time that must lie outside TTFT for a published pair to agree.

    With the same requests in flight on DEP4 and on DWDP of ``gpus`` GPUs, N = X (TTFT + Z), so the
    TTFT ratio is (1 - z) / (1/r - z), r the ratio of throughputs and z = Z X / N of DEP4.

    Returns:
        The least and the largest z when the published figures are rounded to two digits.
    """
    found = []
    for first in (ttft - 0.005, ttft + 0.005):
        for second in (tps - 0.005, tps + 0.005):
            found.append((first / (second * gpus / 4) - 1) / (first - 1))
    return min(found), max(found)


def readings(requests: int) -> dict[str, dict[str, str]]:
    """How many rows hold when Table 1's wait is read otherwise; each reading is one constant for all."""
    parts = dep(MODEL, GB200, PAPER_PRECISION, table_1_rounds()).parts
    own = parts.attention + parts.dense_gemm + parts.other
    packed = length_wait(parts, mean_batch(table_1_rounds()), table_1_rounds())
    choices = {
        "lengths as packed (6 %), the rest hot experts": packed,
        "prompts vary by 20 % (used)": table_1_length_wait(parts),
        "half of the wait is lengths": TABLE_1_DEP.synchronisation / 2,
        "ranks' totals vary by 20 %": own * 0.20 * expected_maximum(4),
        "all of it lengths": TABLE_1_DEP.synchronisation,
    }
    found: dict[str, dict[str, str]] = {}
    for name, by_lengths in choices.items():
        skew = calibrate(by_lengths).expert_skew
        gpu = replace(GB200, expert_skew=skew)
        rows = [*ablation(requests, gpu), *context_server(requests, gpu)]
        found[name] = {"ms by lengths": f"{1e3 * by_lengths:.0f}", "expert skew": f"{skew:.2f}"}
        for table in dict.fromkeys(row.table for row in rows):
            members = [row for row in rows if row.table == table]
            errors = [row.error for row in members]
            held = f"{sum(bool(row.holds) for row in members)} of {len(members)}"
            found[name][table] = f"{held} ({min(errors):+.1f} to {max(errors):+.1f} pt)"
    return found


def print_sensitivity(console: Console, requests: int) -> dict[str, object]:
    """Print what other assumptions would give, and return it."""
    table = Table(title="Readings of Table 1's wait", title_justify="left")
    table.add_column("reading")
    found = readings(requests)
    for label in next(iter(found.values())):
        table.add_column(label, justify="right")
    for name, values in found.items():
        table.add_row(name, *values.values())
    console.print(table)
    outside = Table(title="Share of time outside TTFT that P Table 3's pairs need", title_justify="left")
    for label in ("case", "least", "most"):
        outside.add_column(label, justify="left" if label == "case" else "right")
    shares = {case: share_outside(ttft, tps, gpus) for case, ttft, tps, gpus in TABLE_3_PAIRS}
    for case, (least, most) in shares.items():
        outside.add_row(case, f"{least:.2f}", f"{most:.2f}")
    console.print(outside)
    packing = Table(title="AMD, 32,768 tokens per rank: ratio by what joins a forward", title_justify="left")
    limits = {"no limit": 0, "16,384 (SGLang's default)": 16384, "one prompt": 1}
    packing.add_column("case")
    for label in ("theirs", *limits):
        packing.add_column(label, justify="right")
    columns = [
        [row for row in mi355x(limit) if row.case.startswith("32768") and "over" in row.table]
        for limit in limits.values()
    ]
    joined: dict[str, list[float]] = {}
    for row, *others in zip(*columns, strict=True):
        joined[row.case] = [row.theirs, row.ours, *(other.ours for other in others)]
        packing.add_row(row.case, *(f"{value:.3f}" for value in joined[row.case]))
    console.print(packing)
    return {
        "readings": found,
        "share_outside_ttft": shares,
        "mi355x_packing": {"limits": list(limits), "ratios": joined},
    }
