"""When a small forward should wait for peers: pure functions of what was measured and what peers published.

A rank waits only where that is sooner than running alone: where the last missing peer is expected, and the joint
forward done, before a forward alone would be. So it waits at most for what a joint forward saves, and where peers keep
what they published it never loses by waiting. A peer that is overdue may come at any moment or not for long; it is
worth the same limit (which at most doubles the time of that forward, as in the ski-rental problem), but after a wait
in vain no other is begun before `PATIENCE` times as long has passed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_dwdp.exchange.round import Phase, Round

PATIENCE = 16  # so waits in vain cost at most 1/16 of the time

Points = Sequence[tuple[int, float]]


def interpolate(points: Points, rows: int) -> float:
    """The time of `rows`, between measured points: linear, level below the first, proportional above the last.

    Args:
        points: (rows, microseconds), rows rising.
        rows: At least 0.

    Returns:
        Microseconds.
    """
    index = bisect_left(points, (rows, float("-inf")))
    if index == 0:
        return points[0][1]
    if index == len(points):
        last, time = points[-1]
        return time * rows / last
    (low, before), (high, after) = points[index - 1], points[index]
    return before + (after - before) * (rows - low) / (high - low)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How long a small forward takes.

    Attributes:
        alone: (rows, microseconds) of a forward that reads peers' experts in place, rows rising.
        joint: The same for a joint forward, by the largest bucket.
    """

    alone: Points
    joint: Points

    def alone_us(self, rows: int) -> float:
        """Microseconds of a forward of `rows` rows alone."""
        return interpolate(self.alone, rows)

    def joint_us(self, bucket: int) -> float:
        """Microseconds of a joint forward whose largest bucket is `bucket`."""
        return interpolate(self.joint, bucket)


def deadline_us(state: Round, rank: int, bucket: int, start_us: int, times: StepTimes, patient_from_us: int = 0) -> int:
    """Until when a rank that is there since `start_us` should wait for its peers.

    Args:
        state: The round as it is now, with or without this rank in it.
        rank: This rank.
        bucket: Rows that it has.
        start_us: When it came.
        times: How long forwards take.
        patient_from_us: Before this time it does not wait for peers that are overdue.

    Returns:
        Microseconds of the clock of `start_us`; `start_us` itself if it should not wait.
    """
    peers = [seat for peer, seat in enumerate(state.seats) if peer != rank]
    largest = max(bucket, *(seat.bucket for seat in peers if seat.phase is Phase.ENTERED), 0)
    saving = times.alone_us(bucket) - times.joint_us(largest)
    missing = [seat.back_us for seat in peers if seat.phase is not Phase.ENTERED]
    if saving <= 0 or any(back - start_us >= saving for back in missing):
        return start_us
    if start_us < patient_from_us and any(back <= start_us for back in missing):
        return start_us
    return start_us + int(saving)


def patient_again_us(start_us: int, now_us: int) -> int:
    """From when a rank that has waited in vain since `start_us` should wait for overdue peers again."""
    return now_us + PATIENCE * (now_us - start_us)
