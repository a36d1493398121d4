"""Which ranks of a server serve, which do not respond, and which are lost: from what can be seen of their processes.

Nothing here knows how a process is looked at. The launcher does that (`srt_patches/rank_watch.py`), a few times a
second, outside of every forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

# Without a sign of life for so long a rank does not respond. A rank gives one between two forwards, so this is longer
# than a forward takes, apart from those that compile kernels; and half of what SGLang gives a health check.
SILENT_S = 10.0


class Condition(StrEnum):
    """Of one rank."""

    SERVING = "serving"
    SILENT = "not responding"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank's condition.

    Attributes:
        condition: What it is.
        since: When it became that, in seconds since the epoch.
        why: What was seen; empty for a rank that serves.
    """

    condition: Condition
    since: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """What the launcher tells the controller when a rank's condition has changed.

    Attributes:
        states: Of all ranks.
        open_requests: Ids of the requests that were not answered when the change was seen.
    """

    states: tuple[RankState, ...]
    open_requests: tuple[str, ...]


class Watch:
    """The conditions of a server's ranks over time.

    A lost rank stays lost. One that does not respond serves again with its next sign of life. If no rank responds,
    those that live are taken to serve: there is nowhere else to send requests.
    """

    def __init__(
        self,
        size: int,
        silent_s: float = SILENT_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Watch `size` ranks, all of which serve.

        Args:
            size: Ranks of the server.
            silent_s: Seconds without a sign of life after which a rank does not respond.
            clock: Seconds that never go back.
            wall: Seconds since the epoch, for `RankState.since`.
        """
        self._silent_s, self._clock, self._wall = silent_s, clock, wall
        self._beats: list[float | None] = [None] * size
        self._heard = [clock()] * size
        self.states = tuple(RankState(Condition.SERVING, wall()) for _ in range(size))

    def look(
        self, ended: Mapping[int, str], stopped: Collection[int], beats: Sequence[float | None]
    ) -> list[tuple[int, RankState]]:
        """Take in what is seen now.

        Args:
            ended: Ranks whose processes are gone, and how each ended.
            stopped: Ranks whose processes are stopped by a signal.
            beats: `[size]`, a number that changes whenever a rank gives a sign of life; None: it cannot be read now.

        Returns:
            The ranks whose condition has changed, with their new states.
        """
        now = self._clock()
        for rank, beat in enumerate(beats):
            if beat is not None and beat != self._beats[rank]:
                self._beats[rank], self._heard[rank] = beat, now
        wanted = [self._condition(rank, ended, stopped, now) for rank in range(len(self.states))]
        if not any(condition is Condition.SERVING for condition, _ in wanted):
            wanted = [(c, why) if c is Condition.LOST else (Condition.SERVING, "") for c, why in wanted]
        changed = [
            (rank, RankState(condition, self._wall(), why))
            for rank, (condition, why) in enumerate(wanted)
            if condition is not self.states[rank].condition
        ]
        if changed:  # the same object says that there is nothing to tell
            states = list(self.states)
            for rank, state in changed:
                states[rank] = state
            self.states = tuple(states)
        return changed

    def _condition(
        self, rank: int, ended: Mapping[int, str], stopped: Collection[int], now: float
    ) -> tuple[Condition, str]:
        if self.states[rank].condition is Condition.LOST:
            return Condition.LOST, self.states[rank].why
        if rank in ended:
            return Condition.LOST, ended[rank]
        if rank in stopped:
            return Condition.SILENT, "its process is stopped"
        silent_s = now - self._heard[rank]
        if silent_s > self._silent_s:
            return Condition.SILENT, f"no sign of life for {silent_s:.0f} s"
        return Condition.SERVING, ""


def serving(states: Sequence[RankState]) -> list[bool]:
    """Which ranks get requests: `[size]`."""
    return [state.condition is Condition.SERVING for state in states]


def living(states: Sequence[RankState]) -> list[bool]:
    """Which ranks are not lost: `[size]`."""
    return [state.condition is not Condition.LOST for state in states]


def status(states: Sequence[RankState]) -> str:
    """All ranks in a line, for people and for `/server_info`."""
    found = [
        f"rank {rank} of {len(states)} {state.condition} "
        f"{'at' if state.condition is Condition.LOST else 'since'} {at(state.since)} ({state.why})"
        for rank, state in enumerate(states)
        if state.condition is not Condition.SERVING
    ]
    return f"degraded: {'; '.join(found)}" if found else f"{len(states)} of {len(states)} ranks serve"


def at(seconds: float) -> str:
    """A time since the epoch as a date and a time of day, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
