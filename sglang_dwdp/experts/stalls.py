"""Copies that do not end: on a GPU nobody waits for them on the host, so a thread looks after them.

It looks at a number in memory. Only when no copy was submitted for as long as one may take does it ask whether the last
ones have ended, so it makes no call of the device's while forwards copy or graphs are captured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from sglang_dwdp.experts.slots import Prefetcher

LIMIT_S = 60.0  # for copies of milliseconds, or seconds where a link has fallen back to the host's memory


class CopyWatch:
    """Calls back once when copies have not ended within a limit."""

    def __init__(
        self,
        prefetcher: Prefetcher,
        limit_s: float,
        on_stall: Callable[[Sequence[str]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look after nothing yet.

        Args:
            prefetcher: Whose copies these are.
            limit_s: Longest time in seconds that a copy may take.
            on_stall: Gets a description of each copy under way; called by the thread.
            clock: Seconds that never go back.
        """
        self._prefetcher, self._limit_s, self._on_stall, self._clock = prefetcher, limit_s, on_stall, clock
        self._seen = -1
        self._since = clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dwdp-stalls", daemon=True)

    def start(self) -> None:
        """Look after copies from now on, a few times within the limit."""
        self._thread.start()

    def look(self) -> bool:
        """Look once.

        Returns:
            Whether copies have stalled, which was called back.
        """
        now, copied = self._clock(), self._prefetcher.copied_bytes
        if copied != self._seen:
            self._seen, self._since = copied, now
        elif now - self._since > self._limit_s:
            self._since = now
            if unfinished := self._prefetcher.unfinished():
                self._on_stall(unfinished)
                return True
        return False

    def close(self) -> None:
        """Stop looking. Idempotent."""
        self._over.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._limit_s / 4):
            if self.look():
                return
