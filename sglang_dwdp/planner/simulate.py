"""Simulation of prefill serving: requests arrive, queue at ranks, and are packed into forwards.

A forward takes what the closed form of `cost` and `dep` says for its very batch. DWDP ranks and replicas run on
their own; the ranks of a DEP group run every forward together.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from sglang_dwdp.planner.cost import dwdp, replica
from sglang_dwdp.planner.dep import dep_forward
from sglang_dwdp.planner.scenario import Scenario
from sglang_dwdp.planner.workload import Batch, Prompt, take


@dataclass
class Result:
    """What a simulation measured.

    Attributes:
        ttft: seconds from arrival to the end of the last prefill chunk, `[requests]`.
        seconds: from the first arrival to the last completion.
        tokens: prompt tokens served.
        forwards: forwards of all ranks (a DEP forward counts once per rank).
        exposed: seconds, of all ranks together, in which kernels waited for copies.
        copying: the same in which copies ran.
        waited: the same in which ranks of a DEP group waited for the slowest one.
        pulled: bytes that all ranks read from peers.
    """

    scenario: Scenario
    ttft: NDArray[np.float64]
    seconds: float
    tokens: int
    forwards: int = 0
    exposed: float = 0.0
    copying: float = 0.0
    waited: float = 0.0
    pulled: float = 0.0

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Prompt tokens per second and GPU over the run."""
        return self.tokens / self.seconds / self.scenario.ranks

    def percentile(self, q: float) -> float:
        """The q-th percentile of TTFT in seconds."""
        return float(np.percentile(self.ttft, q))


class _Rank:
    """One GPU's queue; `step` lists the ranks that run their forwards together, this one included."""

    def __init__(self) -> None:
        self.queue: deque[Prompt] = deque()
        self.backlog = 0.0  # tokens
        self.busy = False
        self.step: Sequence[_Rank] = (self,)


class _Simulation:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = s = scenario
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = count()
        rng = np.random.default_rng(s.seed)
        self.requests = [Prompt(int(n)) for n in s.lengths.sample(s.requests, rng)]
        self.waiting = iter(self.requests)
        self.ranks = [_Rank() for _ in range(s.ranks)]
        if s.mode == "dep":
            for index, rank in enumerate(self.ranks):
                first = index - index % s.group_size
                rank.step = self.ranks[first : first + s.group_size]
        self.turn = count()
        self.frontend_free = 0.0
        self.result = Result(s, np.zeros(0), 0.0, sum(r.length for r in self.requests))
        if s.rate:
            arrivals = np.cumsum(rng.exponential(1 / s.rate, s.requests)).tolist()
        else:
            arrivals = [0.0] * (s.concurrency or s.requests)
        for time in arrivals:
            self.at(time, self.submit)

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.order), action))

    def submit(self) -> None:
        """The next request leaves its client."""
        request = next(self.waiting, None)
        if request is None:
            return
        request.arrival = self.now
        if self.scenario.frontend:  # one after another
            self.frontend_free = max(self.frontend_free, self.now) + self.scenario.frontend
            self.at(self.frontend_free, lambda: self.deliver(request))
        else:
            self.deliver(request)

    def deliver(self, request: Prompt) -> None:
        if self.scenario.router == "least_tokens":
            rank = min(self.ranks, key=lambda r: r.backlog)
        else:
            rank = self.ranks[next(self.turn) % len(self.ranks)]
        rank.queue.append(request)
        rank.backlog += request.length
        self.start(rank.step)

    def start(self, ranks: Sequence[_Rank]) -> None:
        """Begin a forward, once everything that happens at this time has happened, unless one runs."""
        if not ranks[0].busy and any(rank.queue for rank in ranks):
            ranks[0].busy = True
            self.at(self.now, lambda: self.forward(ranks))

    def forward(self, ranks: Sequence[_Rank]) -> None:
        s = self.scenario
        formed = [take(rank.queue, s.token_budget, s.chunked, s.model.window, s.max_prefill_tokens) for rank in ranks]
        for rank, (batch, _) in zip(ranks, formed, strict=True):
            rank.backlog -= batch.tokens
        seconds = self.seconds([batch for batch, _ in formed])
        self.result.forwards += len(ranks)
        self.at(self.now + seconds, lambda: self.finish(ranks, [r for _, finished in formed for r in finished]))

    def seconds(self, batches: Sequence[Batch]) -> float:
        """Seconds of one forward, and what it adds to the counters."""
        s, result = self.scenario, self.result
        if s.mode == "dep":
            seconds, waited = dep_forward(s.model, s.gpu, s.precision, batches, s.exchange)
            result.waited += waited
            return seconds
        if s.mode == "replica":
            return replica(s.model, s.gpu, s.precision, batches[0]).seconds
        estimate = dwdp(s.model, s.gpu, s.precision, batches[0], s.group)
        result.exposed += estimate.parts.exposed_copy
        result.copying += estimate.fetch
        result.pulled += estimate.fetch_bytes
        return estimate.seconds

    def finish(self, ranks: Sequence[_Rank], requests: Sequence[Prompt]) -> None:
        ranks[0].busy = False
        for request in requests:
            request.finished = self.now
            if self.scenario.concurrency:
                self.submit()
        self.start(ranks)

    def run(self) -> Result:
        while self.events:
            self.now, _, action = heapq.heappop(self.events)
            action()
        self.result.ttft = np.array([r.finished - r.arrival for r in self.requests])
        self.result.seconds = self.now - min(r.arrival for r in self.requests)
        return self.result


def simulate(scenario: Scenario) -> Result:
    """Run `scenario` until every request is served. Deterministic for a given seed."""
    return _Simulation(scenario).run()
