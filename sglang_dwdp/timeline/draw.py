"""Drawing: a row for each stream, exposed times in red above the compute stream's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sglang_dwdp.timeline.trace import Gpu, Interval

_COMPUTE, _COPY, _EXPOSED = "tab:blue", "tab:green", "tab:red"
_PIXELS = 4000  # of a picture's width; pauses that are narrower are not drawn


def draw(gpus: Sequence[Gpu], waits: Sequence[Sequence[Interval]], origin: float, path: Path) -> None:
    """Write a PNG, PDF or SVG.

    Args:
        gpus: at least one.
        waits: `[len(gpus)]`, when compute waited for copies.
        origin: 0 on the axis of time, in microseconds of the profile's clock.
        path: of the picture; its ending is the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows: list[tuple[str, str, Sequence[Interval]]] = []
    for gpu, waited in zip(gpus, waits, strict=True):
        rows.append((f"GPU {gpu.number}: exposed", _EXPOSED, waited))
        rows.append((f"compute (stream {gpu.compute.number})", _COMPUTE, gpu.compute.busy))
        rows += [(f"copies (stream {stream.number})", _COPY, stream.busy) for stream in gpu.copies]
    ends = [interval for _, _, found in rows for interval in found]
    narrow = (max(one.end for one in ends) - min(one.start for one in ends)) / _PIXELS
    figure, axes = pyplot.subplots(figsize=(14, 1.2 + 0.45 * len(rows)), layout="constrained")
    for row, (_, color, found) in enumerate(rows):
        drawn = [((one.start - origin) / 1000, (one.end - one.start) / 1000) for one in closed(found, narrow)]
        axes.broken_barh(drawn, (row - 0.4, 0.8), facecolors=color, linewidth=0)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms since the first kernel")
    named = {"compute": _COMPUTE, "copies": _COPY, "compute waits for a copy": _EXPOSED}
    handles = [Patch(color=color, label=label) for label, color in named.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    axes.margins(y=0.25)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def closed(intervals: Iterable[Interval], narrow: float) -> list[Interval]:
    """Intervals in order, joined where the pause between two is shorter than `narrow` microseconds."""
    result: list[Interval] = []
    for interval in intervals:
        if result and interval.start - result[-1].end < narrow:
            result[-1] = Interval(result[-1].start, max(result[-1].end, interval.end))
        else:
            result.append(interval)
    return result
