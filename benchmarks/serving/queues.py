"""How many requests and tokens wait on every rank while a benchmark runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

Sample = dict[str, Any]
_BARS = " ▁▂▃▄▅▆▇█"


class QueueSampler:
    """Polls a function of SGLang's loads from a thread; the context manager starts and stops it.

    samples: one for each poll: `seconds` since the start, and by rank (in order) `waiting` requests, `running`
    requests, and `pending_tokens` that wait for prefill.
    """

    def __init__(self, loads: Callable[[], list[dict[str, Any]]], period_s: float = 0.1) -> None:
        self.samples: list[Sample] = []
        self._loads = loads
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        start = time.monotonic()
        while not self._stop.is_set():
            ranks = sorted(self._loads(), key=lambda load: int(load["dp_rank"]))
            if ranks:
                self.samples.append(
                    {
                        "seconds": round(time.monotonic() - start, 3),
                        "waiting": [int(load["num_waiting_reqs"]) for load in ranks],
                        "running": [int(load["num_running_reqs"]) for load in ranks],
                        "pending_tokens": [int(load["num_waiting_uncached_tokens"]) for load in ranks],
                    }
                )
            self._stop.wait(self._period_s)

    def __enter__(self) -> QueueSampler:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join(10)


def trim(samples: Sequence[Sample], margin_s: float = 0.5, most: int = 2000) -> list[Sample]:
    """The samples from shortly before the first request to shortly after the last, with seconds from there.

    The benchmark's own start, some seconds of imports, is no part of the load. Of a long run every n-th sample is
    kept, `most` of them at most.
    """
    busy = [sample["seconds"] for sample in samples if any(sample["waiting"]) or any(sample["running"])]
    if not busy:
        return []
    start, end = max(0.0, busy[0] - margin_s), busy[-1] + margin_s
    kept = [sample for sample in samples if start <= sample["seconds"] <= end]
    step = -(-len(kept) // most)
    return [{**sample, "seconds": round(sample["seconds"] - start, 3)} for sample in kept[::step]]


def depths(samples: Sequence[Sample]) -> list[list[int]]:
    """Requests on each rank (waiting and running) over time, `[ranks][samples]`."""
    if not samples:
        return []
    per_sample = [[w + r for w, r in zip(s["waiting"], s["running"], strict=True)] for s in samples]
    ranks = max(len(row) for row in per_sample)
    return [[row[rank] if rank < len(row) else 0 for row in per_sample] for rank in range(ranks)]


def sparkline(values: Sequence[float], top: float, width: int = 60) -> str:
    """Values over time as a line of bars that is `width` wide at most; a column shows the largest of its values."""
    if not values or top <= 0:
        return ""
    columns = min(width, len(values))
    bounds = [column * len(values) // columns for column in range(columns + 1)]
    peaks = [max(values[a:b]) for a, b in pairwise(bounds)]
    return "".join(_BARS[min(8, round(8 * peak / top))] if peak else _BARS[0] for peak in peaks)


def lines_of(samples: Sequence[Sample]) -> list[str]:
    """Requests on each rank, and tokens that wait there for prefill, over the time of a run, drawn as bars."""
    return [
        f"  {what} on rank {rank} over time, at most {max(row):6,d}: {sparkline(row, top)}"
        for what, ranks in (("requests", depths(samples)), ("waiting tokens", pending(samples)))
        for top in [max((max(row) for row in ranks), default=0)]
        for rank, row in enumerate(ranks)
        if top
    ]


def pending(samples: Sequence[Sample]) -> list[list[int]]:
    """Tokens that wait for prefill on each rank over time, `[ranks][samples]`."""
    return [list(row) for row in zip(*(sample["pending_tokens"] for sample in samples), strict=True)]
