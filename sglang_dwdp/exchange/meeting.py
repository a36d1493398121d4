"""How a rank meets its peers before a small forward: enter, wait as long as that pays, and run joint or alone.

A wait spins for some tens of microseconds, for a peer that is just about to come, then sleeps as long at a time. It is
for one number in memory (`Page.version`); the page's lock is taken only when that has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange.bells import Bells
from sglang_dwdp.exchange.page import Page
from sglang_dwdp.exchange.policy import StepTimes, after_waiting, deadline_us
from sglang_dwdp.exchange.round import Joint, Phase, Round

logger = logging.getLogger(__name__)
_SPIN_US = 50
_NAP_S = 20e-6
_HELP_US = 2000  # at a time: an idle rank's scheduler has requests to look for


def _clock_us() -> int:
    return time.monotonic_ns() // 1000  # one clock for all processes of a host


@dataclasses.dataclass(slots=True)
class RoundCounters:
    """Totals since the start, for /server_info.

    Attributes:
        joint_rounds: Joint rounds that this rank had rows in.
        helped_rounds: Joint rounds in which it had none.
        alone_rounds: Small forwards that it ran alone without waiting.
        withdrawn_rounds: Small forwards that it ran alone after waiting in vain.
        round_wait_us: Microseconds waited, in vain or not.
        helped_rows: Peers' rows in those.
    """

    joint_rounds: int = 0
    helped_rounds: int = 0
    alone_rounds: int = 0
    withdrawn_rounds: int = 0
    round_wait_us: int = 0
    helped_rows: int = 0

    def as_dict(self) -> dict[str, int]:
        """The totals by name."""
        return dataclasses.asdict(self)


class Meeting:
    """One rank's side of the rounds. Owns its page and its bells."""

    def __init__(
        self,
        page: Page,
        times: StepTimes,
        bells: Bells | None = None,
        *,
        serves: bool = False,
        clock_us: Callable[[], int] = _clock_us,
    ) -> None:
        """Meet peers.

        Args:
            page: The group's.
            times: May be replaced as measurements come in.
            bells: Peers without them never sleep.
            serves: This rank helps peers while its GPU runs a forward of its own.
            clock_us: For tests.
        """
        self.page = page
        self.bells = bells
        self.times = times
        self.counters = RoundCounters()
        self.ended = False
        self._clock_us = clock_us
        self._patient_from_us = (0,) * page.size
        self._serves = serves
        self._back_us = 0  # as it was published
        self._wanted = False  # peers waited when this rank looked last
        self._closed = False

    def meet(self, bucket: int, rows: int | None = None) -> Joint | None:
        """A forward of `bucket` rows is about to run.

        Args:
            bucket: Of the joint forward, if no peer has more.
            rows: As in `StepTimes.alone_us`.

        Returns:
            The joint round that it is part of: run `bucket` of it, with all peers. This rank's own may be 0 in it:
            help with a prefill of peers, and meet again. None: run alone.

        Raises:
            DwdpRuntimeError: A peer is stopped while it holds the page (see `Page.change`).
        """
        if self.ended:
            self.counters.alone_rounds += 1
            return None
        rank, alone_us = self.page.rank, self.times.alone_us(bucket, rows)
        start = self._clock_us()
        state, waited_us = self._meet(
            bucket,
            lambda state: deadline_us(state, rank, bucket, start, self.times, self._patient_from_us, rows),
            0 if self._serves else alone_us,
        )
        joint = state.joint_of(rank)
        self.counters.round_wait_us += waited_us
        if joint is not None:
            self._count(joint)
            self._patient_from_us = (0,) * self.page.size  # all came
        elif waited_us:
            self.counters.withdrawn_rounds += 1
            logger.debug("DWDP: waited %d us in vain, with %d rows: %s", waited_us, bucket, state.seats)
            in_vain_us = min(waited_us, int(alone_us))  # no deadline is later; the rest was for a core
            self._patient_from_us = after_waiting(state, rank, start + waited_us, in_vain_us, self._patient_from_us)
        else:
            self.counters.alone_rounds += 1
        return joint

    def help(self, *, wait: bool = True) -> Joint | None:
        """A rank that is idle, or that serves, looks whether peers wait for it.

        Costs one read of memory while nothing changes.

        Args:
            wait: Where others are missing too, wait with those that do, for at most some milliseconds at a time.

        Returns:
            The joint round to run with no rows of its own, or None.

        Raises:
            DwdpRuntimeError: As `meet`.
        """
        rank, early = self.page.rank, self._back_us > self._clock_us()
        if self.ended or (self.page.version == self.page.seen and not self._wanted and not early):
            return None
        self._back_us = 0
        self._change(lambda state: state.publish(rank, 0) if early else state)
        if not self._wanted:
            return None
        end = self._clock_us() + (_HELP_US if wait else 0)
        state, waited_us = self._meet(0, lambda state: end if state.wants_help(rank) else 0, 0)
        self.counters.round_wait_us += waited_us
        joint = state.joint_of(rank)
        if joint is not None:
            self._count(joint)
        return joint

    def _count(self, joint: Joint) -> None:
        if joint.buckets[self.page.rank]:
            self.counters.joint_rounds += 1
        else:
            self.counters.helped_rounds += 1
            self.counters.helped_rows += sum(joint.buckets)

    def go_away(self, duration_us: float) -> None:
        """A forward that is not small is launched; peers need not wait for this rank before it is back.

        Args:
            duration_us: Until it is: until the forward has ended or, if this rank serves, until it is launched.

        Raises:
            DwdpRuntimeError: As `meet`.
        """
        if not self.ended:
            self._back_us = self._clock_us() + int(duration_us)
            self._change(lambda state: state.publish(self.page.rank, self._back_us))

    def end(self) -> None:
        """A joint forward failed here: no further round is joint, on any rank.

        Raises:
            DwdpRuntimeError: As `meet`.
        """
        self._change(lambda state: state.depart(self.page.rank))

    def close(self) -> None:
        """Leave for good; peers go on alone. Idempotent."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(DwdpRuntimeError):  # peers see it by the page's lock as well
                self.end()
            self.page.close()
            if self.bells is not None:
                self.bells.close()

    def _meet(self, bucket: int, deadline: Callable[[Round], int], away_us: float) -> tuple[Round, int]:
        """Enter and wait; the state at the end, and microseconds waited. If in vain, be away for `away_us`."""
        rank = self.page.rank
        start = self._clock_us()

        def enter(state: Round) -> Round:
            entered = state.enter(rank, bucket)
            if entered.joint_of(rank) is not None:
                state = self._without_lost(state)  # no round with a peer that died while it waited
                if not state.ended:
                    return entered
            elif not entered.ended and deadline(state) > start:
                return entered
            return state.publish(rank, start + int(away_us))

        def withdraw(state: Round) -> Round:
            left = state.withdraw(rank)
            if left.joint_of(rank) is not None:
                return left
            return self._without_lost(left.publish(rank, self._clock_us() + int(away_us)))

        state = self._change(enter)
        if self.bells is not None and bucket and state.seats[rank].phase is Phase.ENTERED:
            self.bells.ring(state.sleepers(start))
        waited_us = 0
        while state.seats[rank].phase is Phase.ENTERED:
            end = deadline(state)
            if end <= self._clock_us():
                state = self._change(withdraw)
            else:
                self._wait(end)
                state = self._change(lambda state: state)
            waited_us = max(self._clock_us() - start, 1)
        return state, waited_us

    def _without_lost(self, state: Round) -> Round:
        for peer in self.page.lost():
            state = state.depart(peer)
        return state

    def _change(self, update: Callable[[Round], Round]) -> Round:
        try:
            state = self.page.change(update)
        except DwdpRuntimeError:
            self.ended = True  # for this rank: the page cannot be had
            self.page.leave()  # where it may have entered, and peers would take it for one that waits
            raise
        self.ended, self._wanted = state.ended, state.wants_help(self.page.rank)
        return state

    def _wait(self, end_us: int) -> None:
        """Return when the state is no longer the one that this rank saw last, or at `end_us`."""
        page, clock = self.page, self._clock_us
        spin_until = min(clock() + _SPIN_US, end_us)
        while page.version == page.seen and clock() < spin_until:
            pass
        while page.version == page.seen and clock() < end_us:
            time.sleep(_NAP_S)
