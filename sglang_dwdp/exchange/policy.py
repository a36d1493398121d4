"""When a small forward should wait for peers: pure functions of what was measured and what peers published.

A rank waits only where that is sooner than running alone: where the last missing peer is expected, and the joint
forward done, before a forward alone would be. Where peers keep what they published it never loses by waiting. A peer
that is overdue may come at any moment or not for long; it is worth as long as a joint forward saves, but after a wait
for it in vain no other is begun before `PATIENCE` times as long has passed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_dwdp.exchange.round import MAX_DECODE_ROWS, Phase, Round

PATIENCE = 4  # so waits in vain cost at most a quarter of the time
# A joint prefill takes its peers' time too, who may have nothing in it. Where prefills of 4,096 tokens were joint that
# were a tenth sooner so, two H200 served 0.80 of replicas' requests; where not, 0.88 and 0.89 (runs of other versions).
_PREFILL_GAIN = 1.25

# The last where copies take long: large groups, many or large experts. Decodes ride along with prompts of such lengths.
_PREFILL_ROWS = tuple(rows + more for rows in (512, 1024, 2048, 4096) for more in (0, rows // 4))
_MOST_RECEIVED = 16384  # rows in a layer, which take as much memory as those of SGLang's largest usual chunk

Points = Sequence[tuple[int, float]]


def prefill_buckets(captured: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Sizes of joint prefills: few, since each is a CUDA graph more.

    Args:
        captured: Sizes of the engine's own prefill graphs.
        ranks: Of the group, each of which may send as many rows to one.

    Returns:
        The largest of them up to 512, 1,024, 2,048 and 4,096 rows and up to a quarter more, but no more than ranks can
        take (5,120 of two, 4,096 of four, 2,048 of eight), rising; none where they are decodes' sizes.
    """
    limits = [min(rows, _MOST_RECEIVED // ranks) for rows in _PREFILL_ROWS]
    found = {max((n for n in captured if MAX_DECODE_ROWS < n <= most), default=0) for most in limits}
    return tuple(sorted(found - {0}))


def joint_prefill_pays(alone: float, joint: float) -> bool:
    """Whether a prefill that takes so long alone, or jointly, is joint."""
    return alone >= _PREFILL_GAIN * joint


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

    def alone_us(self, bucket: int, rows: int | None = None) -> float:
        """Microseconds of a forward alone.

        Args:
            bucket: Rows of its graph.
            rows: That are a request's, if that forward is no graph of this bucket: a prefill of few tokens reads the
                experts that they chose in place, as a decode does.
        """
        alone = interpolate(self.alone, bucket)
        return alone if rows is None else min(alone, interpolate(self.alone, rows))

    def joint_us(self, bucket: int) -> float:
        """Microseconds of a joint forward whose largest bucket is `bucket`."""
        return interpolate(self.joint, bucket)

    def is_joint(self, bucket: int) -> bool:
        """Whether prefills of `bucket` tokens are joint where peers have none."""
        return joint_prefill_pays(self.alone_us(bucket), self.joint_us(bucket))

    def may_save(self, bucket: int, rows: int | None = None) -> bool:
        """Whether a forward (see `alone_us`) is sooner done jointly than alone, if peers have no more rows."""
        return self.alone_us(bucket, rows) > self.joint_us(bucket)


def deadline_us(
    state: Round,
    rank: int,
    bucket: int,
    start_us: int,
    times: StepTimes,
    patient_from_us: Sequence[int],
    rows: int | None = None,
) -> int:
    """Until when a rank that is there since `start_us` should wait for its peers.

    Args:
        state: The round as it is now, with or without this rank in it.
        rank: This rank.
        bucket: That it came with.
        start_us: When it came.
        times: How long forwards take.
        patient_from_us: For each rank, before which time it is not waited for if it is overdue.
        rows: As in `StepTimes.alone_us`.

    Returns:
        Microseconds of the clock of `start_us`; `start_us` itself if it should not wait.
    """
    peers = [(peer, seat) for peer, seat in enumerate(state.seats) if peer != rank]
    largest = max(bucket, *(seat.bucket for _, seat in peers if seat.phase is Phase.ENTERED), 0)
    saving = times.alone_us(bucket, rows) - times.joint_us(largest)
    missing = [(peer, seat.back_us) for peer, seat in peers if seat.phase is not Phase.ENTERED]
    if saving <= 0 or any(back - start_us >= saving for _, back in missing):
        return start_us
    if any(back <= start_us < patient_from_us[peer] for peer, back in missing):
        return start_us
    return start_us + int(saving)


def after_waiting(
    state: Round, rank: int, now_us: int, waited_us: int, patient_from_us: Sequence[int]
) -> tuple[int, ...]:
    """The new `patient_from_us` of a rank that has waited in vain.

    Args:
        state: As the rank left it.
        rank: This rank.
        now_us: When it left.
        waited_us: How long it waited for peers; not for a core, which no peer can help.
        patient_from_us: As before.

    Returns:
        For each rank, when a wait for it may begin though it is overdue.
    """
    again = now_us + PATIENCE * waited_us
    return tuple(
        again if peer != rank and seat.phase is not Phase.ENTERED and seat.back_us <= now_us else before
        for peer, (seat, before) in enumerate(zip(state.seats, patient_from_us, strict=True))
    )
