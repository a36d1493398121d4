"""The round: when do the ranks of a group run their next small forward together? A pure state machine.

A rank that is about to run a small forward *enters* with its bucket (the rows its CUDA graph takes). When every rank
has entered, and one of them has rows, the round is *joint*: all run it, at the largest bucket. Until then a rank may
*withdraw* and run alone. A rank that goes away *publishes* when it expects to be back. One that has died or left
*departs*, which ends joint rounds for good: the others go on alone.

Each method is one atomic change; whoever stores the state (`page.py`) applies changes one after the other. Then

- all ranks agree on the number and the buckets of every joint round, in the same order: both are part of the state,
  and the next round cannot be joint before every rank has picked up the last one, by entering anew;
- an attempt is joint for every rank or for none: `withdraw` of a rank whose round became joint meanwhile changes
  nothing and answers with that round;
- nobody has to wait: `withdraw` is possible at any time.

A decode and a prefill cannot be one forward: their graphs differ. Where ranks have entered with both, the round is that
of the prefills; ranks that were about to decode help with it, and enter anew.

There is no clock in here. Times are passed in, in microseconds of one clock that all ranks read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

MAX_DECODE_ROWS = 256  # a larger bucket is a prefill's


class Phase(IntEnum):
    """What a rank is doing, as far as the round knows."""

    AWAY = 0  # in a forward of its own, or idle
    ENTERED = 1
    JOINT = 2  # in the round that became joint last
    GONE = 3  # dead or departed, for good


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's part of the state.

    Attributes:
        phase: What the rank is doing.
        bucket: Rows that it entered with; 0 for an idle rank that helps.
        back_us: When it expects to be back, as it published; 0 if it may come at any moment.
    """

    phase: Phase = Phase.AWAY
    bucket: int = 0
    back_us: int = 0


@dataclass(frozen=True, slots=True)
class Joint:
    """A joint round.

    Attributes:
        number: Counts joint rounds from 1.
        buckets: Rows that each rank has in it, in rank order; 0 for one that is idle, or that entered to decode while
            a peer has a prefill.
    """

    number: int
    buckets: tuple[int, ...]

    @property
    def bucket(self) -> int:
        """The largest bucket, which all ranks run."""
        return max(self.buckets)


@dataclass(frozen=True, slots=True)
class Round:
    """The state that the ranks of a group share.

    Attributes:
        seats: One for each rank.
        last: The round that became joint last; its number is 0 if none did.
    """

    seats: tuple[Seat, ...]
    last: Joint

    @staticmethod
    def start(size: int) -> Round:
        """The state of a group of `size` ranks that have yet to come."""
        return Round((Seat(),) * size, Joint(0, (0,) * size))

    @property
    def ended(self) -> bool:
        """There will be no further joint round."""
        return any(seat.phase is Phase.GONE for seat in self.seats)

    def wants_help(self, rank: int) -> bool:
        """A peer that has rows waits, so that an idle `rank` would do well to enter with none."""
        return not self.ended and any(
            seat.phase is Phase.ENTERED and seat.bucket for peer, seat in enumerate(self.seats) if peer != rank
        )

    def sleepers(self, now_us: int) -> list[int]:
        """Ranks that may be idle, so that one of them may sleep: also those that have not come since the last round."""
        return [
            rank
            for rank, seat in enumerate(self.seats)
            if seat.phase in (Phase.AWAY, Phase.JOINT) and seat.back_us <= now_us
        ]

    def joint_of(self, rank: int) -> Joint | None:
        """The joint round that `rank` is in, or None."""
        return self.last if self.seats[rank].phase is Phase.JOINT else None

    def enter(self, rank: int, bucket: int) -> Round:
        """`rank` is about to run `bucket` rows. Whatever round it was in is over for it.

        Once joint rounds have ended it does not enter: it runs alone.

        Raises:
            ValueError: The rank has entered already, or `bucket` is negative.
        """
        if self.seats[rank].phase is Phase.ENTERED or bucket < 0:
            raise ValueError(f"rank {rank} cannot enter {self} with {bucket} rows")
        if self.ended:
            return self.publish(rank, 0)
        entered = self._with(rank, Seat(Phase.ENTERED, bucket))
        buckets = tuple(seat.bucket for seat in entered.seats)
        if not any(buckets) or any(seat.phase is not Phase.ENTERED for seat in entered.seats):
            return entered
        if max(buckets) > MAX_DECODE_ROWS:
            buckets = tuple(bucket if bucket > MAX_DECODE_ROWS else 0 for bucket in buckets)
        joint = tuple(Seat(Phase.JOINT, bucket) for bucket in buckets)
        return Round(joint, Joint(self.last.number + 1, buckets))

    def withdraw(self, rank: int) -> Round:
        """`rank` has waited enough. Unchanged if the round is joint (see `joint_of`): the rank must run it."""
        return self._with(rank, Seat()) if self.seats[rank].phase is Phase.ENTERED else self

    def publish(self, rank: int, back_us: int) -> Round:
        """`rank` goes away and expects to be back at `back_us`. Whatever round it was in is over for it.

        Raises:
            ValueError: The rank has entered: it has to withdraw first.
        """
        if self.seats[rank].phase is Phase.ENTERED:
            raise ValueError(f"rank {rank} cannot go away from {self}: it has entered")
        return self if self.seats[rank].phase is Phase.GONE else self._with(rank, Seat(back_us=back_us))

    def depart(self, rank: int) -> Round:
        """`rank` is dead, or leaves. Ranks that wait are set free; a round that is joint stays so."""
        gone = self._with(rank, Seat(Phase.GONE))
        return replace(gone, seats=tuple(Seat() if seat.phase is Phase.ENTERED else seat for seat in gone.seats))

    def _with(self, rank: int, seat: Seat) -> Round:
        return replace(self, seats=(*self.seats[:rank], seat, *self.seats[rank + 1 :]))
