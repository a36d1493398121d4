"""Timing a GPU's compute stream while it waits for copies."""

from __future__ import annotations

from typing import Any

import torch


class Stopwatch:
    """How long the compute stream stood at its waits, estimated from a sample of them.

    One wait in `every` is timed, by a pair of events around it. The pairs are used in turn and read when their turn
    comes again, or when someone asks, so nothing ever waits for the GPU. A wait that finds its pair still on the way,
    many waits later, is not timed.

    Args:
        every: waits that one timed wait stands for. A prime, so that over several forwards every layer's waits are
            among the timed ones.
    """

    PAIRS = 64
    EVERY = 17

    def __init__(self, every: int = EVERY) -> None:
        self._every = every
        self._skip = 0
        self._pairs: list[tuple[Any, Any]] = []
        self._running: list[bool] = []
        self._turn = 0
        self._ms = 0.0

    def start(self, stream: Any) -> Any:
        """Note that `stream` is about to wait.

        Returns:
            The event to record after the wait, or None where the wait is not timed.
        """
        if self._skip:
            self._skip -= 1
            return None
        self._skip = self._every - 1
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
        """Seconds of all waits that the GPU has passed, as the timed ones show them."""
        for index in range(len(self._pairs)):
            self._read(index)
        return self._ms * self._every / 1000

    def _read(self, index: int) -> bool:
        """Add what a pair measured; False while the GPU is still on its way there."""
        if self._running[index]:
            first, last = self._pairs[index]
            if not last.query():
                return False
            self._ms += first.elapsed_time(last)
            self._running[index] = False
        return True
