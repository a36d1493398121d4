"""Timing a GPU's compute stream while it waits for copies."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch


class Stopwatch:
    """How long the compute stream stood at its waits, estimated from a sample of them.

    One wait in `every` is timed, by a pair of events around it. Pairs are read when the GPU has passed them, so nothing
    ever waits for the GPU; while many are on the way, waits are not timed.

    Args:
        every: waits that one timed wait stands for. A prime, so that over several forwards every layer's waits are
            among the timed ones.
    """

    PAIRS = 64
    EVERY = 17

    def __init__(self, every: int = EVERY) -> None:
        self._every = every
        self._waits = 0
        self._pairs: deque[tuple[Any, Any]] = deque()
        self._ms = 0.0

    def start(self, stream: Any) -> Any:
        """Note that `stream` is about to wait.

        Returns:
            The event to record after the wait, or None where the wait is not timed.
        """
        is_timed = self._waits % self._every == 0
        self._waits += 1
        if not is_timed:
            return None
        self._read()
        if len(self._pairs) == self.PAIRS:
            return None
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record(stream)
        self._pairs.append((first, last))
        return last

    def seconds(self) -> float:
        """Seconds of all waits that the GPU has passed, as the timed ones show them."""
        self._read()
        return self._ms * self._every / 1000

    def _read(self) -> None:
        while self._pairs and self._pairs[0][1].query():
            first, last = self._pairs.popleft()
            self._ms += first.elapsed_time(last)
