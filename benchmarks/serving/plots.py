"""The report's figures, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from benchmarks.serving.figures import Row, rows
from benchmarks.serving.queues import depths
from benchmarks.serving.results import Results
from benchmarks.serving.scenario import Point

# Okabe-Ito: told apart by colour-blind readers and in grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
MARKERS = "osD^vPX*"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
    return plt


def all_plots(results: Results) -> list[tuple[str, str]]:
    """(caption, SVG) of every figure that there are results for."""
    by_variant: dict[str, list[Row]] = {variant.name: [] for variant in results.scenario.variants}
    for point in results.scenario.load.points():
        for row in rows(results, point):
            by_variant[row.variant].append(row)
    by_variant = {name: found for name, found in by_variant.items() if found}
    if not by_variant:
        return []
    device = "rank" if results.scenario.cpu else "GPU"
    plots = [
        (f"Throughput per {device} over TPOT: up and to the left is better", _throughput(by_variant, device)),
        ("Time to first token over load: median (filled) and p99 (open)", _ttft(by_variant)),
    ]
    if any(row.exposed_copy == row.exposed_copy for found in by_variant.values() for row in found):
        plots.append(("Exposed copy time: what compute waited for experts to be copied", _exposed(by_variant)))
    for point in results.scenario.load.points():
        figure = _queues(results, point)
        if figure:
            plots.append((f"Requests on each rank over time (waiting and running), {point.label}", figure))
    return plots


def _svg(draw: Callable[[Any, Any], None], width: float = 7.5, height: float = 4.2) -> str:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    draw(figure, axis)
    return _save(plt, figure)


def _save(plt: Any, figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _style(index: int) -> dict[str, Any]:
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)], "markersize": 7}


def _throughput(by_variant: dict[str, list[Row]], device: str) -> str:
    def draw(_figure: Any, axis: Any) -> None:
        for index, (name, found) in enumerate(by_variant.items()):
            found = sorted(found, key=lambda row: row.tpot)
            axis.plot([r.tpot for r in found], [r.per_device for r in found], label=name, **_style(index))
            for row in found:
                axis.annotate(
                    row.point.label, (row.tpot, row.per_device), xytext=(5, 5), textcoords="offset points", fontsize=7
                )
        axis.set_xlabel("TPOT, median (ms)")
        axis.set_ylabel(f"output tokens/s per {device}")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.15)
        axis.legend(frameon=False)

    return _svg(draw)


def _ttft(by_variant: dict[str, list[Row]]) -> str:
    labels = list(dict.fromkeys(row.point.label for found in by_variant.values() for row in found))

    def draw(_figure: Any, axis: Any) -> None:
        for index, (name, found) in enumerate(by_variant.items()):
            places = [labels.index(row.point.label) for row in found]
            style = _style(index)
            axis.plot(places, [row.ttft for row in found], label=name, **style)
            axis.plot(places, [row.ttft_p99 for row in found], linestyle="--", markerfacecolor="white", **style)
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlabel("load")
        axis.set_ylabel("TTFT (ms)")
        axis.set_yscale("log")
        axis.margins(x=0.15)
        axis.legend(frameon=False)

    return _svg(draw)


def _exposed(by_variant: dict[str, list[Row]]) -> str:
    bars = [
        (f"{name}\n{row.point.label}", 100 * row.exposed_copy)
        for name, found in by_variant.items()
        for row in found
        if row.exposed_copy == row.exposed_copy
    ]

    def draw(_figure: Any, axis: Any) -> None:
        places = range(len(bars))
        drawn = axis.bar(places, [share for _, share in bars], color=PALETTE[4], width=0.6)
        axis.bar_label(drawn, [f"{share:.2f} %" for _, share in bars], fontsize=8)
        axis.set_xticks(places, [label for label, _ in bars], fontsize=8)
        axis.set_ylabel("share of the run (%), mean over ranks")
        axis.margins(y=0.15)

    return _svg(draw, width=max(5.0, 1.6 * len(bars)))


def _queues(results: Results, point: Point) -> str | None:
    records = [(v.name, results.run(v, point)) for v in results.scenario.variants]
    found = [(name, record) for name, record in records if record and record["queues"]]
    if not found:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(found),
        1,
        figsize=(9, 0.6 + 1.7 * len(found)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, record) in zip(axes[:, 0], found, strict=True):
        seconds = [sample["seconds"] for sample in record["queues"]]
        for rank, row in enumerate(depths(record["queues"])):
            axis.step(seconds, row, where="post", color=PALETTE[rank % len(PALETTE)], label=f"rank {rank}")
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel("requests")
        axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper right")
    axes[-1, 0].set_xlabel("seconds since the start of the benchmark")
    return _save(plt, figure)
