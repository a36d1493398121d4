"""Tables of what `engines.py` measured, as Markdown (pure)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BASELINES = ("dep", "replicas")
Row = Mapping[str, Any]


def spread(rates: Sequence[float]) -> float:
    """How far the repeats lie apart: (largest - smallest) / median."""
    return (max(rates) - min(rates)) / statistics.median(rates)


def cell(rates: Mapping[str, Sequence[float]], name: str) -> str:
    """A variant's median in tokens per second, its ratios to the baselines, and how far its repeats lie apart."""
    if not rates.get(name):
        return "–"
    median = statistics.median(rates[name])
    ratios = [
        f"{median / statistics.median(rates[base]):.2f} {base}"
        for base in BASELINES
        if base != name and rates.get(base)
    ]
    notes = [*ratios, f"±{100 * spread(rates[name]):.0f} %"] if len(rates[name]) > 1 else ratios
    return f"{median:,.0f}" + (f" ({', '.join(notes)})" if notes else "")


def markdown(result: Row) -> str:
    """All tables: rates, DWDP's counters, tokens, starts and errors."""
    variants: Mapping[str, Row] = result["variants"]
    measured = [name for name in variants if any(row["rates"].get(name) for row in result["cases"])]
    lines: list[str] = []
    if measured:
        lines += ["Tokens/s of all ranks, medians (ratio to a baseline, largest minus smallest of the median):", ""]
        lines += _table(
            ["case", *measured],
            [
                [row["case"], *(cell(row["rates"], name) for name in measured)]
                for row in result["cases"]
                if row["rates"]
            ],
        )
    counted = [
        [
            row["case"],
            name,
            *(_counts(reports, key) for key in ("staged_forwards", "direct_forwards", "joint_forwards", "late_fills")),
            " / ".join(f"{1e3 * report.get('exposed_copy_s', 0):.1f}" for report in reports),
        ]
        for row in result["cases"]
        for name, reports in row["counters"].items()
    ]
    if counted:
        lines += ["", "Counters of DWDP in all repeats of a case, rank by rank:", ""]
        lines += _table(["case", "variant", "staged", "direct", "joint", "late fills", "ms waited for copies"], counted)
    if result.get("tokens"):
        lines += ["", "Answers that are those of `replicas`:", ""]
        rows = [[name, *map(str, found.values())] for name, found in result["tokens"].items()]
        lines += _table(["variant", "answers", "same tokens", "bitwise"], rows)
    started = [
        [name, str(found["start_s"]), ", ".join(map(str, found.get("memory_gib", ())))]
        for name, found in variants.items()
        if "start_s" in found
    ]
    if started:
        lines += ["", *_table(["variant", "seconds to start", "GiB on each GPU after it"], started)]
    errors = [f"- {name}: {found['error']}" for name, found in variants.items() if "error" in found]
    errors += [f"- {name}: {found['untuned']}" for name, found in variants.items() if found.get("untuned")]
    lines += ["", *errors, *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines).strip() + "\n"


def _counts(reports: Sequence[Mapping[str, float]], key: str) -> str:
    return " / ".join(f"{report.get(key, 0):,.0f}" for report in reports)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
