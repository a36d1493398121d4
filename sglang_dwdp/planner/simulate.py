"""Discrete-event simulation of prefill serving: queues, forwards, copies.

A rank packs its queue into forwards. DWDP ranks and replicas run on their own; the ranks of a DEP
group run every layer in step. A DWDP rank's copy engine is a process of its own that runs ahead of
the kernels by ``depth`` layers and shares each source GPU's port with its other readers.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import simpy
from simpy.events import Event

from .cost import layer_fetch_bytes, pull_bandwidth
from .forward_times import dep_forward, layer_times
from .outcome import TIMELINE_LIMIT, Result, Span
from .rank import Rank, Request
from .scenario import Scenario
from .workload import Batch


class _Simulation:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.env = simpy.Environment()
        self.rng = np.random.default_rng(scenario.seed)
        self.ranks = [Rank(self.env, scenario, i) for i in range(scenario.ranks)]
        self.requests = [Request(int(n), 0.0) for n in scenario.lengths.sample(scenario.requests, self.rng)]
        self.next_rank = self.next_request = self.completed = self.forwards = 0
        self.waited = 0.0
        self.timeline: list[Span] = []
        self.incoming = simpy.Store(self.env)
        self.all_done = self.env.event()

    # -- load ------------------------------------------------------------------------------------

    def submit(self) -> None:
        if self.next_request >= len(self.requests):
            return
        request = self.requests[self.next_request]
        self.next_request += 1
        request.arrival = float(self.env.now)
        if self.scenario.frontend:
            self.incoming.put(request)
        else:
            self.deliver(request)

    def tokenize(self) -> Generator[Event, Any, None]:
        """The frontend: passes requests on one after another."""
        while True:
            request = yield self.incoming.get()
            yield self.env.timeout(self.scenario.frontend)
            self.deliver(request)

    def deliver(self, request: Request) -> None:
        if self.scenario.router == "least_tokens":
            rank = min(self.ranks, key=lambda r: r.backlog)
        else:
            rank = self.ranks[self.next_rank]
            self.next_rank = (self.next_rank + 1) % len(self.ranks)
        rank.queue.append(request)
        rank.backlog += request.length
        if rank.arrived is not None:
            waiting, rank.arrived = rank.arrived, None
            if not waiting.triggered:  # the ranks of a group in step share one event
                waiting.succeed()

    def arrivals(self) -> Generator[Event, Any, None]:
        s = self.scenario
        if not s.rate:
            for _ in range(s.concurrency or s.requests):
                self.submit()
            return
        for gap in self.rng.exponential(1 / s.rate, s.requests):
            yield self.env.timeout(gap)
            self.submit()

    def finish(self, requests: list[Request]) -> None:
        for request in requests:
            request.finished = float(self.env.now)
            self.completed += 1
            if self.scenario.concurrency:
                self.submit()
        if self.completed == len(self.requests) and not self.all_done.triggered:
            self.all_done.succeed()

    def wait_for_work(self, ranks: list[Rank]) -> Generator[Event, Any, None]:
        while not any(rank.queue for rank in ranks):
            arrived = self.env.event()
            for rank in ranks:
                rank.arrived = arrived
            yield arrived
            for rank in ranks:
                rank.arrived = None

    # -- compute ---------------------------------------------------------------------------------

    def noise(self, rank: Rank, *shape: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        sigma = np.sqrt(np.log1p(self.scenario.jitter**2))
        return rank.compute_rng.lognormal(-(sigma**2) / 2, sigma, shape)

    def span(self, rank: int, kind: str, start: float) -> None:
        """Note what a rank of the first group did from ``start`` until now."""
        now = float(self.env.now)
        if rank < self.scenario.group_size and len(self.timeline) < TIMELINE_LIMIT and now > start:
            self.timeline.append(Span(rank, kind, start, now))

    def independent(self, rank: Rank) -> Generator[Event, Any, None]:
        s, env = self.scenario, self.env
        moe = s.model.moe_layers
        fetches = s.mode == "dwdp" and layer_fetch_bytes(s.model, s.precision, s.group) > 0
        done = 0
        while True:
            yield from self.wait_for_work([rank])
            batch, finished = rank.form(s)
            times = layer_times(s, batch)
            self.forwards += 1
            started, rank.step_started = rank.step_started, env.event()
            started.succeed()
            factors = self.noise(rank, moe).tolist() if s.jitter else [1.0] * moe
            if not fetches:  # nothing to wait for: one event for the whole forward
                start = float(env.now)
                yield env.timeout(times.dense + (times.before + times.experts) * sum(factors))
                self.span(rank.index, "forward", start)
                self.finish(finished)
                continue
            pending = times.dense
            for factor in factors:
                start = float(env.now)
                yield env.timeout(pending + times.before * factor)
                self.span(rank.index, "compute", start)
                pending = 0.0
                start = float(env.now)
                if rank.slots.filled <= done:
                    yield from rank.slots.wait_filled(done)
                    rank.exposed += float(env.now) - start
                    self.span(rank.index, "wait", start)
                start = float(env.now)
                yield env.timeout(times.experts * factor)
                self.span(rank.index, "experts", start)
                rank.slots.release()
                done += 1
            self.finish(finished)

    def in_step(self, ranks: list[Rank]) -> Generator[Event, Any, None]:
        """A group whose ranks meet in every layer: DEP, or replicas under a barrier."""
        s, env, n = self.scenario, self.env, len(ranks)
        moe = s.model.moe_layers
        while True:
            yield from self.wait_for_work(ranks)
            formed = [rank.form(s) for rank in ranks]
            batches = [batch for batch, _ in formed]
            self.forwards += n
            if s.mode == "replica":
                times = [layer_times(s, b) for b in batches]
                heads = [t.dense for t in times]
                factors = self.noise(ranks[0], moe, n) if s.jitter else np.ones((moe, n))
                layers = np.array([t.before + t.experts for t in times]) * factors
                duration = max(heads) + float(layers.max(axis=1).sum())
                self.waited += n * duration - float(layers.sum()) - sum(heads)
            else:
                duration = self.dep_seconds(ranks[0], batches)
            start = float(env.now)
            yield env.timeout(duration)
            for rank in ranks:
                self.span(rank.index, "forward", start)
            self.finish([request for _, finished in formed for request in finished])

    def dep_seconds(self, first: Rank, batches: list[Batch]) -> float:
        """One DEP forward with jitter: every layer takes as long as its slowest rank."""
        times = dep_forward(self.scenario, batches)
        moe = self.scenario.model.moe_layers
        own = np.array(times.own)
        slowest = float(own.max())
        if self.scenario.jitter:
            slowest = float((own / moe * self.noise(first, moe, len(batches))).max(axis=1).sum())
        self.waited += max(0.0, (slowest + times.hot_experts) * len(batches) - float(own.sum()))
        return slowest + times.hot_experts + times.exchange

    # -- copies ----------------------------------------------------------------------------------

    def copies(self, rank: Rank, group: list[Rank]) -> Generator[Event, Any, None]:
        """The copy engine of one rank: layer after layer, ``depth`` ahead, for ever."""
        s, env = self.scenario, self.env
        size = layer_fetch_bytes(s.model, s.precision, s.group)
        peers = [group[(rank.index + k) % len(group)] for k in range(1, len(group))]
        if size == 0 or not peers:
            return
        share = size / len(peers)
        layer = 0
        while True:
            if not s.ring_over_steps and layer % s.model.moe_layers == 0:
                yield rank.step_started
            yield from rank.slots.wait_free(layer)
            start = float(env.now)
            if s.copies == "sliced" or not s.gpu.switched:
                # slices load all sources evenly, and a mesh has a wire per pair: no sharing
                yield env.timeout(size / pull_bandwidth(s.gpu, s.group))
                for peer in peers:
                    peer.port.served += share
            else:
                order = rank.copy_rng.permutation(len(peers)) if s.order == "random" else range(len(peers))
                for i in order:
                    yield peers[i].port.pull(share)
            rank.pulled += size
            rank.copying += float(env.now) - start
            self.span(rank.index, "copy", start)
            rank.slots.fill()
            layer += 1

    def run(self) -> Result:
        s, env = self.scenario, self.env
        for first in range(0, s.ranks, s.group_size):
            group = self.ranks[first : first + s.group_size]
            if s.mode == "dep" or s.lockstep:
                env.process(self.in_step(group))
                continue
            for rank in group:
                env.process(self.independent(rank))
                if s.mode == "dwdp":
                    env.process(self.copies(rank, group))
        env.process(self.arrivals())
        if s.frontend:
            env.process(self.tokenize())
        env.run(self.all_done)
        first_arrival = min(r.arrival for r in self.requests)
        return Result(
            scenario=s,
            ttft=np.array([r.finished - r.arrival for r in self.requests]),
            seconds=float(env.now) - first_arrival,
            tokens=sum(r.length for r in self.requests),
            exposed=[r.exposed for r in self.ranks],
            copying=[r.copying for r in self.ranks],
            pulled=[r.pulled for r in self.ranks],
            served=[r.port.served for r in self.ranks],
            forwards=self.forwards,
            waited=self.waited,
            timeline=self.timeline,
        )


def simulate(scenario: Scenario) -> Result:
    """Run ``scenario`` until every request is served. Deterministic for a given seed."""
    return _Simulation(scenario).run()
