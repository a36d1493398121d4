"""A simulated rank: its queue of prompts, and the forwards that it packs from it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import simpy
from simpy.events import Event

from .fabric import Port, Slots
from .scenario import Scenario
from .workload import Batch, batch_of


@dataclass
class Request:
    """One prompt on its way: times in simulated seconds."""

    length: int
    arrival: float
    done: int = 0
    finished: float = -1.0


class Rank:
    """One simulated GPU: its queue, its copy slots, its outgoing port, its counters."""

    def __init__(self, env: simpy.Environment, s: Scenario, index: int) -> None:
        self.index = index
        # of its own, so that what one rank draws does not depend on when the others do
        self.compute_rng = np.random.default_rng([s.seed, index, 0])
        self.copy_rng = np.random.default_rng([s.seed, index, 1])
        self.queue: deque[Request] = deque()
        self.backlog = 0
        self.arrived: Event | None = None
        self.slots = Slots(env, s.depth)
        self.port = Port(env, s.gpu.copy_bandwidth)
        self.step_started = env.event()
        self.exposed = self.copying = self.pulled = 0.0

    def form(self, scenario: Scenario) -> tuple[Batch, list[Request]]:
        """Take a forward's worth from the queue, first come, first served."""
        room = scenario.token_budget
        pieces: list[tuple[int, int]] = []
        finished: list[Request] = []
        while self.queue and room > 0:
            request = self.queue[0]
            rest = request.length - request.done
            if not scenario.chunked and pieces and rest > room:
                break
            take = min(rest, room) if scenario.chunked else rest
            pieces.append((take, request.done))
            request.done += take
            room -= take
            self.backlog -= take
            if request.done < request.length:
                break
            finished.append(self.queue.popleft())
            if scenario.max_prefill_tokens and sum(new for new, _ in pieces) >= scenario.max_prefill_tokens:
                break
        return batch_of(pieces, scenario.model.window), finished
