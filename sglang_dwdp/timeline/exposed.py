"""Exposed copies: times in which the compute stream stood still and waited for one (pure).

A profile does not say what a stream waits for. Where it waited for a copy, it goes on as soon as the copy has ended. So
a pause counts from the first copy in it to the last one's end, if the pause ends right after that. Copies in a pause
that goes on without them were hidden behind something else, such as a host that was late.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from sglang_dwdp.timeline.trace import Gpu, Interval, union

GOES_ON_US = 20.0
"""Microseconds between the end of a copy and the start of the kernel that waited for it: at most so many."""


def exposed(gpu: Gpu, goes_on_us: float = GOES_ON_US) -> list[Interval]:
    """When the compute stream of a GPU waited for copies, in order.

    Args:
        gpu: of a profile.
        goes_on_us: see `GOES_ON_US`.
    """
    ends = sorted(interval.end for stream in gpu.copies for interval in stream.busy)
    copying = union(interval for stream in gpu.copies for interval in stream.busy)
    found: list[Interval] = []
    for before, after in pairwise(gpu.compute.busy):
        last = _last_at(ends, after.start)
        if last is not None and last > before.end and after.start - last <= goes_on_us:
            found.append(Interval(overlaps(copying, Interval(before.end, last))[0].start, last))
    return found


def _last_at(ends: Sequence[float], moment: float) -> float | None:
    index = bisect_right(ends, moment)
    return ends[index - 1] if index else None


def overlaps(intervals: Sequence[Interval], within: Interval) -> list[Interval]:
    """What lies within an interval of others, which are in order and without overlaps."""
    first = max(0, bisect_right(intervals, within.start, key=lambda interval: interval.start) - 1)
    result = []
    for interval in intervals[first:]:
        if interval.start >= within.end:
            break
        start, end = max(interval.start, within.start), min(interval.end, within.end)
        if end > start:
            result.append(Interval(start, end))
    return result
