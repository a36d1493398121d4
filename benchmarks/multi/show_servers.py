"""Tables, targets and the plot of servers and of the crossover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.multi.crossover import worst_above
from benchmarks.multi.show import Target, new_table
from benchmarks.multi.tokens import share_same
from benchmarks.multi.variants import DEFAULT, DEP, IN_TREE, OURS

Result = Mapping[str, Any]
PREFILL_TO_DEP, PREFILL_TO_IN_TREE, DECODE_TO_IN_TREE = 1.10, 1.05, 5.0


def rate_table(servers: Result) -> Table:
    """One row for each workload, one column for each variant: tokens per second of all ranks, and ours to it."""
    names = [name for name, found in servers["variants"].items() if "ready_s" in found]
    table = new_table(f"tokens per second of all ranks ({OURS}'s ratio to it)", ("", *names))
    for label, row in _rows(servers):
        rates = row["tokens_per_s"]
        cells = []
        for name in names:
            text = f"{rates[name]:,.0f}" if name in rates else ""
            if name in rates and OURS in rates and name != OURS:
                text += f" ({rates[OURS] / rates[name]:.2f})"
            cells.append(text)
        table.add_row(label, *cells)
    return table


def _rows(servers: Result) -> list[tuple[str, Result]]:
    rows = []
    for row in servers["prefill"]:
        varied = f", lengths vary by {row['variation']:.0%}" if row["variation"] else ""
        rows.append((f"prefill {row['length']:,} × {row['prompts']} on a rank{varied}", row))
    return rows + [(f"decode, {row['sequences']} on a rank", row) for row in servers["decode"]]


def token_table(servers: Result) -> Table:
    """Tokens against the reference's; of different ones, how many rounding explains."""
    title = f"greedy tokens on every rank, against {servers.get('reference')} (rank 0)"
    columns = ("", "answers", "same tokens", "log-probabilities bitwise", "largest difference of one", "different")
    table = new_table(title, (*columns, "… of two best within rounding"))
    for name, row in servers["tokens"].items():
        different = row["answers"] - row["same_tokens"]
        cells = (row["answers"], row["same_tokens"], row["same_logprobs"], f"{row['largest_difference']:.2g}")
        table.add_row(name, *map(str, cells), str(different), str(row["ties"]) if different else "")
    return table


def crossover_table(found: Result) -> Table:
    """Measured and planned."""
    planner = found["planner"] or "an unknown GPU"
    columns = ("lengths vary by", "measured, tokens of a rank", f"planned for {planner}")
    table = new_table(f"{OURS} beats {DEP} from", columns)
    for entry in found["by_variation"]:
        table.add_row(f"{entry['variation']:.0%}", entry["measured_text"], entry.get("planned_text", "not planned"))
    return table


def server_targets(servers: Result, found: Result) -> list[Target]:
    """Prefill above the crossover, at the worst measured point and variation; decode; tokens."""
    to_dep, to_in_tree = [], []
    for entry in found.get("by_variation", ()):
        to_dep.append(worst_above(entry["ratio_to_dep"], entry["measured"]))
        to_in_tree.append(worst_above(entry["ratio_to_in_tree"], entry["measured"]))
    decodes = [row["tokens_per_s"] for row in servers["decode"]]
    ratios = [rate[OURS] / rate[IN_TREE] for rate in decodes if OURS in rate and IN_TREE in rate]
    everybody = all(name in servers["tokens"] for name in DEFAULT)
    return [
        Target(f"prefill to {DEP}, at the worst point above the crossover", PREFILL_TO_DEP, _least(to_dep)),
        Target(f"prefill to {IN_TREE}, at the worst point above the crossover", PREFILL_TO_IN_TREE, _least(to_in_tree)),
        Target(f"decode to {IN_TREE}, the worst number of sequences", DECODE_TO_IN_TREE, _least(ratios)),
        Target("share of answers with the same tokens, the worst variant", 1.0, share_same(servers["tokens"]))
        if everybody
        else Target("share of answers with the same tokens, all four variants", 1.0, None),
    ]


def _least(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def plot(servers: Result, found: Result, path: Path) -> bool:
    """Prefill rates, their ratio to expert parallelism, and decode rates, as a PNG; False where there is nothing."""
    if not servers["prefill"] and not servers["decode"]:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.serving.plots import MARKERS, PALETTE

    names = [name for name, each in servers["variants"].items() if "ready_s" in each]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for index, name in enumerate(names):
        style: dict[str, Any] = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
        for variation in sorted({row["variation"] for row in servers["prefill"]}):
            rows = [r for r in servers["prefill"] if r["variation"] == variation and name in r["tokens_per_s"]]
            label = name if not variation else None
            left.plot(*_line(rows, name), label=label, linestyle="--" if variation else "-", **style)
        rows = [row for row in servers["decode"] if name in row["tokens_per_s"]]
        places = [row["sequences"] for row in rows]
        right.plot(places, [row["tokens_per_s"][name] for row in rows], label=name, **style)
    for index, entry in enumerate(found.get("by_variation", ())):
        color, varied = PALETTE[index], f"lengths vary by {entry['variation']:.0%}"
        for key, marker, line, label in (
            ("ratio_to_dep", "o", "-", f"measured, {varied}"),
            ("planned_ratio", None, ":", f"planned, {varied}"),
        ):
            points = entry.get(key) or ()
            if points:
                middle.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=label)
    middle.axhline(1.0, color="grey", linewidth=1)
    for axis, title in (
        (left, "prefill, tokens/s of all ranks (dashed: lengths vary)"),
        (middle, f"prefill, {OURS} to {DEP}"),
        (right, "decode, tokens/s of all ranks"),
    ):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_title(title)
        axis.set_xlabel("sequences of a rank" if axis is right else "tokens of a rank's forward")
        axis.grid(alpha=0.3)
        axis.set_ylabel("ratio" if axis is middle else "tokens/s")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="lower right" if axis is middle else "upper left")
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter("{x:,.0f}")
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _line(rows: Sequence[Result], name: str) -> tuple[list[int], list[float]]:
    ordered = sorted(rows, key=lambda row: int(row["length"]))
    return [row["length"] for row in ordered], [row["tokens_per_s"][name] for row in ordered]
