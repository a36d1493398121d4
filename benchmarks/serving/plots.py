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


def _by_kind(found: list[Row]) -> list[list[Row]]:
    """Rates and concurrencies apart: a line between the two would say nothing."""
    kinds = ([row for row in found if row.point.kind == kind] for kind in ("rate", "concurrency"))
    return [rows for rows in kinds if rows]


def _throughput(by_variant: dict[str, list[Row]], device: str) -> str:
    def draw(_figure: Any, axis: Any) -> None:
        for index, (name, found) in enumerate(by_variant.items()):
            for number, line in enumerate(_by_kind(found)):
                label = None if number else name
                axis.plot([r.tpot for r in line], [r.per_device for r in line], label=label, **_style(index))
            for row in found:
                axis.annotate(
                    row.point.label, (row.tpot, row.per_device), xytext=(6, -3), textcoords="offset points", fontsize=7
                )
        axis.set_xlabel("TPOT, median (ms)")
        axis.set_ylabel(f"output tokens/s per {device}")
        shown = [row for found in by_variant.values() for row in found]
        axis.set_xlim(0, 1.25 * max(row.tpot for row in shown))
        axis.set_ylim(0, 1.15 * max(row.per_device for row in shown))
        axis.legend(frameon=False, loc="lower left")

    return _svg(draw)


def _ttft(by_variant: dict[str, list[Row]]) -> str:
    labels = list(dict.fromkeys(row.point.label for found in by_variant.values() for row in found))

    def draw(_figure: Any, axis: Any) -> None:
        for index, (name, found) in enumerate(by_variant.items()):
            for number, line in enumerate(_by_kind(found)):
                places, style = [labels.index(row.point.label) for row in line], _style(index)
                axis.plot(places, [row.ttft for row in line], label=None if number else name, **style)
                axis.plot(places, [row.ttft_p99 for row in line], linestyle="--", markerfacecolor="white", **style)
        values = [value for found in by_variant.values() for row in found for value in (row.ttft, row.ttft_p99)]
        if max(values) > 20 * min(values):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1 * max(values))
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlabel("load")
        axis.set_ylabel("TTFT (ms)")
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
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1, 0].set_xlabel("seconds since the first request")
    return _save(plt, figure)
