"""Figures: speed-up and memory of a plan, TTFT and timeline of a simulation.

matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

from typing import Any

from .outcome import Result, Span
from .plan import Plan

# Okabe-Ito colours: distinct for colour-blind readers and in grey.
COLOURS = {
    "dwdp": "#0072B2",
    "dep": "#D55E00",
    "in-tree dwdp": "#009E73",
    "replica": "#7F7F7F",
    "forward": "#0072B2",
    "compute": "#0072B2",
    "experts": "#56B4E9",
    "wait": "#D55E00",
    "copy": "#E69F00",
}
MEMORY_PARTS = (
    ("attention", "replicated weights", "#0072B2"),
    ("experts", "routed experts", "#56B4E9"),
    ("slots", "prefetch slots", "#E69F00"),
    ("activations", "activations", "#009E73"),
    ("runtime", "runtime", "#7F7F7F"),
    ("kv_cache", "left for KV cache", "#E5E5E5"),
)

TIMELINE_KERNELS = 24
KERNELS = ("forward", "compute", "experts")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_plan(plan: Plan, path: str) -> None:
    """Write a PNG, PDF or SVG: speed-up over DEP by tokens per rank, and memory by scheme."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    tokens = [p.tokens for p in plan.points]
    series = {
        "dwdp": [p.speedup for p in plan.points],
        "in-tree dwdp": [p.in_tree.tokens_per_second / p.dep.tokens_per_second for p in plan.points],
    }
    if plan.points[0].replica:  # larger forwards may not leave it room
        series["replica"] = [p.replica.tokens_per_second / p.dep.tokens_per_second for p in plan.points if p.replica]
    labels = {"dwdp": "DWDP", "in-tree dwdp": "in-tree-style DWDP", "replica": "replica"}
    for name, values in series.items():
        left.plot(tokens[: len(values)], values, marker="o", color=COLOURS[name], label=labels[name])
    left.axhline(1.0, color=COLOURS["dep"], linewidth=1.2, label="DEP")
    left.set_xscale("log", base=2)
    ticks = [t for t in tokens if t & (t - 1) == 0]
    left.set_xticks(ticks, [f"{t // 1024}K" if t >= 1024 else str(t) for t in ticks])
    left.minorticks_off()
    left.set_xlabel("tokens per rank and forward")
    left.set_ylabel("tokens/s per GPU, relative to DEP")
    left.set_ylim(bottom=0)
    if plan.crossover and plan.crossover > plan.points[0].tokens:
        left.axvline(plan.crossover, color="#999999", linestyle=":")
        left.annotate(
            f"DWDP pays from\n{plan.crossover:,} tokens",
            (plan.crossover, 0.0),
            xytext=(6, 10),
            textcoords="offset points",
            fontsize=9,
            color="#555555",
        )
    left.grid(alpha=0.3)
    left.legend(frameon=False, loc="best")
    left.set_title("Prefill rate")

    _memory_bars(right, plan)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(plan.title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _memory_bars(axis: Any, plan: Plan) -> None:
    """GB of one GPU by scheme; a bar that does not fit is cut and says how long it is."""
    room = plan.case.gpu.memory / 1e9
    edge = min(1.5 * room, max(room, *(m.used / 1e9 for m in plan.memories.values()))) * 1.04
    names = list(plan.memories)
    for row, name in enumerate(names):
        start = 0.0
        parts = plan.memories[name]
        for attribute, label, colour in MEMORY_PARTS:
            width = max(0.0, getattr(parts, attribute)) / 1e9
            outline = "#999999" if attribute == "kv_cache" else "white"
            axis.barh(
                row,
                width,
                left=start,
                color=colour,
                edgecolor=outline,
                linewidth=0.5,
                label=label if row == 0 else None,
            )
            start += width
        if start > edge:
            axis.text(edge * 0.99, row, f"{start:,.0f} GB in all →", ha="right", va="center", fontsize=9)
    axis.axvline(room, color="black", linestyle="--", linewidth=1)
    axis.text(room, -0.62, "GPU memory ", ha="right", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), [name.replace("dwdp", "DWDP").replace("dep", "DEP") for name in names])
    axis.set_ylim(len(names) - 0.4, -0.85)
    axis.set_xlim(0, edge)
    axis.set_xlabel("GB per GPU")
    axis.set_title(f"Memory at {plan.chunk:,} tokens per rank")


def plot_results(results: list[Result], path: str) -> None:
    """Write TTFT distributions of several scenarios and the first one's timeline."""
    plt = _pyplot()
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(13, 7.5), layout="constrained", gridspec_kw={"height_ratios": [1, 1.15]}
    )
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#7F7F7F", "#56B4E9")
    for i, result in enumerate(results):
        ttft = sorted(result.ttft.tolist())
        share = [(k + 1) / len(ttft) for k in range(len(ttft))]
        label = f"{result.scenario.name} ({result.tokens_per_second_per_gpu:,.0f} tok/s/GPU)"
        style = ("-", "--", "-.", ":")[i % 4]  # curves that coincide stay visible
        top.plot(ttft, share, color=palette[i % len(palette)], linestyle=style, linewidth=2, label=label)
    top.set_xlabel("TTFT (s)")
    top.set_ylabel("share of requests")
    top.set_ylim(0, 1.02)
    top.set_xlim(left=0)
    top.grid(alpha=0.3)
    top.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    top.set_title("Time to first token")
    _timeline(bottom, next((r for r in results if r.scenario.mode == "dwdp"), results[0]))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _window(spans: list[Span], ranks: list[int]) -> tuple[float, float]:
    """(start, end) of about twelve layers of the first rank in which all ranks have work, and wait most for copies."""
    first = [span for span in spans if span.rank == ranks[0] and span.kind in KERNELS]
    length = min(TIMELINE_KERNELS, len(first))
    windows = [
        (first[i].start, first[i + length - 1].end) for i in range(0, len(first) - length + 1, max(1, length // 2))
    ]

    def share(window: tuple[float, float], kinds: tuple[str, ...]) -> float:
        start, end = window
        overlap = (max(0.0, min(s.end, end) - max(s.start, start)) for s in spans if s.kind in kinds)
        return sum(overlap) / (end - start) / len(ranks)

    return max(windows, key=lambda window: (round(share(window, (*KERNELS, "wait")), 2), share(window, ("wait",))))


def _timeline(axis: Any, result: Result) -> None:
    """Kernels and copies of the first ranks of a group over a window of about twelve layers."""
    ranks = sorted({span.rank for span in result.timeline if span.kind in KERNELS})[:4]
    spans = [span for span in result.timeline if span.rank in ranks]
    if not ranks:
        axis.set_axis_off()
        return
    start, stop = _window(spans, ranks)
    names = {
        "forward": "a forward",
        "compute": "attention and dense",
        "experts": "experts",
        "wait": "waiting for a copy",
        "copy": "copy",
    }
    bars: dict[str, Any] = {}
    for span in spans:
        begin, end = max(span.start, start), min(span.end, stop)
        if end <= begin:
            continue
        row = 2.4 * ranks.index(span.rank) + (1 if span.kind == "copy" else 0)
        bars[span.kind] = axis.broken_barh(
            [((begin - start) * 1e3, (end - begin) * 1e3)],
            (row - 0.42, 0.84),
            color=COLOURS[span.kind],
            edgecolor="white",
            linewidth=0.6,
        )
    what = ("kernels", "copies") if result.scenario.mode == "dwdp" else ("kernels",)
    ticks = [2.4 * i + k for i in range(len(ranks)) for k in range(len(what))]
    axis.set_yticks(ticks, [f"rank {r} {kind}" for r in ranks for kind in what])
    axis.set_ylim(2.4 * len(ranks) - 0.9, -0.9)
    axis.set_xlim(0, (stop - start) * 1e3)
    axis.set_xlabel(f"time (ms, from {start:.2f} s on)")
    axis.set_title(f"Timeline: {result.scenario.name}")
    shown = [kind for kind in names if kind in bars]
    axis.legend(
        [bars[kind] for kind in shown],
        [names[kind] for kind in shown],
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
