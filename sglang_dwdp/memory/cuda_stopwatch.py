"""Timing a GPU's compute stream while it waits for copies."""

from __future__ import annotations

from typing import Any

import torch


class Stopwatch:
    """How long the compute stream stood at its waits, by pairs of events around each of them.

    The pairs are used in turn and read when their turn comes again, or when someone asks, so nothing ever waits
    for the GPU. A wait that finds its pair still on the way, many waits later, is not timed.
    """

    PAIRS = 512

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self._running: list[bool] = []
        self._turn = 0
        self._ms = 0.0

    def start(self, stream: Any) -> Any:
        """Note that `stream` is about to wait; the event to record after the wait, or None where it is not timed.

        Nothing is timed in a graph's capture, which must not ask for an event's state.
        """
        if torch.cuda.is_current_stream_capturing():
            return None
        index = self._turn
        self._turn = (index + 1) % self.PAIRS
        if index == len(self._pairs):
            timed = torch.cuda.Event
            self._pairs.append((timed(enable_timing=True), timed(enable_timing=True)))  # type: ignore[no-untyped-call]
            self._running.append(False)
        if not self._read(index):
            return None
        first, last = self._pairs[index]
        first.record(stream)
        self._running[index] = True
        return last

    def seconds(self) -> float:
        """All waits that the GPU has passed."""
        for index in range(len(self._pairs)):
            self._read(index)
        return self._ms / 1000

    def _read(self, index: int) -> bool:
        """Add what a pair measured; False while the GPU is still on its way there."""
        if self._running[index]:
            first, last = self._pairs[index]
            if not last.query():
                return False
            self._ms += first.elapsed_time(last)
            self._running[index] = False
        return True
