"""Copy engines and links in the simulator."""

from __future__ import annotations

import heapq
from collections.abc import Generator
from typing import Any

import simpy
from simpy.events import Event


class Port:
    """One GPU's outgoing link: its readers share ``bandwidth`` (bytes/s) equally.

    Processor sharing by virtual time: every reader advances at bandwidth/n, so a pull of b bytes
    ends when the virtual clock has advanced by b.
    """

    def __init__(self, env: simpy.Environment, bandwidth: float) -> None:
        self.env = env
        self.bandwidth = bandwidth
        self.served = 0.0
        self.busy = 0.0
        self._virtual = 0.0
        self._last = 0.0
        self._order = 0
        self._token = 0
        self._pulls: list[tuple[float, int, float, Event]] = []

    def pull(self, size: float) -> Event:
        """An event that succeeds when ``size`` bytes have been read."""
        self._advance()
        done = self.env.event()
        self._order += 1
        heapq.heappush(self._pulls, (self._virtual + size, self._order, size, done))
        self._schedule()
        return done

    def _advance(self) -> None:
        now = float(self.env.now)
        if self._pulls:
            self._virtual += (now - self._last) * self.bandwidth / len(self._pulls)
            self.busy += now - self._last
        self._last = now

    def _schedule(self) -> None:
        self._token += 1
        if not self._pulls:
            return
        token = self._token
        wait = max(0.0, self._pulls[0][0] - self._virtual) * len(self._pulls) / self.bandwidth
        timer = self.env.timeout(wait)
        assert timer.callbacks is not None  # a fresh event is not processed yet
        timer.callbacks.append(lambda _event: self._finish(token))

    def _finish(self, token: int) -> None:
        if token != self._token:  # the set of readers changed since
            return
        self._advance()
        finish, _, size, done = heapq.heappop(self._pulls)
        self._virtual = finish  # exact, whatever rounding did
        self.served += size
        done.succeed()
        self._schedule()


class Slots:
    """``depth`` layer buffers between a rank's copies and its kernels.

    Layers are counted from the start of the simulation: ``filled`` of them have arrived and
    ``released`` have been used, so the copy of layer k may start once k - released < depth.
    """

    def __init__(self, env: simpy.Environment, depth: int) -> None:
        self.env = env
        self.depth = depth
        self.filled = 0
        self.released = 0
        self._wake_copy: Event | None = None
        self._wake_compute: Event | None = None

    def wait_free(self, layer: int) -> Generator[Event, Any, None]:
        """Wait until layer number ``layer`` has a slot."""
        while layer - self.released >= self.depth:
            self._wake_copy = self.env.event()
            yield self._wake_copy

    def wait_filled(self, layer: int) -> Generator[Event, Any, None]:
        """Wait until layer number ``layer`` has arrived."""
        while self.filled <= layer:
            self._wake_compute = self.env.event()
            yield self._wake_compute

    def fill(self) -> None:
        """The next layer has arrived."""
        self.filled += 1
        waiting, self._wake_compute = self._wake_compute, None
        if waiting is not None:
            waiting.succeed()

    def release(self) -> None:
        """The oldest layer has been used."""
        self.released += 1
        waiting, self._wake_copy = self._wake_copy, None
        if waiting is not None:
            waiting.succeed()
