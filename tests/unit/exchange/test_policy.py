"""When to wait: the rules by themselves, and what they give in an event simulation of ranks that prefill and decode."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.exchange.policy import (
    PATIENCE,
    StepTimes,
    after_waiting,
    deadline_us,
    interpolate,
    prefill_buckets,
)
from sglang_dwdp.exchange.round import Phase, Round

# Decoding alone is bound by a link, decoding together by memory; no machine's measurement.
TIMES = StepTimes(alone=((1, 2_000), (8, 10_000), (32, 20_000)), joint=((1, 2_400), (8, 3_000), (32, 4_500)))
PREFILL_US = 40_000
EACH = (512, 640, 1024, 1280, 2048, 2560, 4096, 5120)
NEW = (0,) * 8  # nobody was waited for in vain


def test_times_between_measurements() -> None:
    points = ((2, 10.0), (4, 30.0))
    assert [interpolate(points, rows) for rows in (0, 2, 3, 4, 8)] == [10, 10, 20, 30, 60]


@pytest.mark.parametrize(
    ("back_us", "expected"),
    [
        (0, 17_000),  # it may come at any moment: wait for as long as a joint forward saves
        (10_999, 17_000),  # back early enough for the joint forward to end first
        (17_000, 10_000),  # no sooner than alone
        (90_000, 10_000),
    ],
)
def test_a_rank_waits_only_where_that_is_sooner(back_us: int, expected: int) -> None:
    state = Round.start(2).publish(1, back_us)
    assert deadline_us(state, 0, 8, 10_000, TIMES, NEW) == expected


@pytest.mark.parametrize(
    ("captured", "ranks", "buckets"),
    [
        ((4, 256, 384, 512, 1024, 2048, 4096, 8192), 2, (512, 1024, 2048, 4096)),
        ((512, 576, 640, 704, 1024, 1280, 1536, 2048, 2560, 4096, 4608, 5120), 2, EACH),
        ((512, 576, 640, 704, 1024, 1280, 1536, 2048, 2560, 4096, 4608, 5120), 4, EACH[:-1]),
        ((4, 256, 384, 512, 1024, 2048, 4096, 8192), 8, (512, 1024, 2048)),
        ((4, 256, 384, 512, 1024, 2048, 3840), 4, (512, 1024, 2048, 3840)),
        ((320, 448, 900, 1500), 4, (448, 900, 1500)),
        ((256, 5632), 2, ()),
        ((300, 512), 64, ()),  # at most 256 from each
        ((300,), 2, (300,)),
        ((), 2, ()),
    ],
)
def test_joint_prefills_take_few_of_the_engine_s_sizes(
    captured: tuple[int, ...], ranks: int, buckets: tuple[int, ...]
) -> None:
    assert prefill_buckets(captured, ranks) == buckets


def test_larger_buckets_of_peers_make_waiting_worth_less() -> None:
    assert deadline_us(Round.start(3).enter(1, 32), 0, 8, 0, TIMES, NEW) == 10_000 - 4_500
    assert deadline_us(Round.start(2), 0, 1, 5, TIMES, NEW) == 5  # one row alone is sooner than together


def test_a_prefill_of_few_tokens_is_worth_no_wait() -> None:
    """Alone it takes as long as a decode of as many rows, whatever the joint graph holds."""
    times = StepTimes(((1, 900.0), (64, 28_000.0), (512, 19_300.0)), ((512, 4_000.0),))
    waits = {rows: deadline_us(Round.start(2), 0, 512, 0, times, NEW, rows) for rows in (1, 16, 64, 500)}
    assert waits[1] == 0
    assert 0 < waits[16] < 4_000
    assert waits[64] == waits[500] == 19_300 - 4_000
    assert not times.may_save(512, 1)
    assert times.may_save(512, 64)


@pytest.mark.parametrize(
    ("joint_us", "expected"), [(4_000.0, True), (15_000.0, True), (17_000.0, False), (24_000.0, False)]
)
def test_prefills_are_joint_where_that_gains_enough(joint_us: float, expected: bool) -> None:
    """It takes peers' time, too."""
    assert StepTimes(((512, 19_300.0),), ((512, joint_us),)).is_joint(512) is expected


def test_overdue_peers_are_not_waited_for_again_at_once() -> None:
    overdue, awaited = Round.start(2), Round.start(2).publish(1, 3_000)
    patient = after_waiting(overdue, 0, 100, 100, NEW[:2])
    assert patient == (0, 100 + PATIENCE * 100)
    for state, waits in ((overdue, False), (awaited, True)):
        assert (deadline_us(state, 0, 8, patient[1] - 1, TIMES, patient) > patient[1] - 1) is waits
        assert deadline_us(state, 0, 8, patient[1], TIMES, patient) > patient[1]


def test_only_those_who_were_missing_and_overdue_lose_trust() -> None:
    state = Round.start(4).publish(1, 50).publish(2, 500).enter(3, 1)
    assert after_waiting(state, 0, 100, 100, (1, 2, 3, 4)) == (1, 100 + 100 * PATIENCE, 3, 4)


@given(
    bucket=st.integers(0, 64),
    start=st.integers(0, 10**6),
    backs=st.lists(st.integers(0, 10**6), min_size=1, max_size=7),
    patient=st.lists(st.integers(0, 10**6), min_size=8, max_size=8),
)
def test_nobody_waits_longer_than_what_a_joint_forward_saves(
    bucket: int, start: int, backs: list[int], patient: int
) -> None:
    state = Round.start(len(backs) + 1)
    for peer, back in enumerate(backs):
        state = state.publish(peer + 1, back)
    deadline = deadline_us(state, 0, bucket, start, TIMES, patient)
    assert start <= deadline <= start + max(0, TIMES.alone_us(bucket) - TIMES.joint_us(bucket))
    if deadline > start:
        assert max(backs) + TIMES.joint_us(bucket) < start + TIMES.alone_us(bucket) or max(backs) <= start


@dataclass
class Group:
    """The round, and an event for each of its changes."""

    env: simpy.Environment
    state: Round
    exchange: bool
    changed: simpy.Event = field(init=False)

    def __post_init__(self) -> None:
        self.changed = self.env.event()

    def change(self, state: Round) -> None:
        self.state = state
        self.changed.succeed()
        self.changed = self.env.event()


@dataclass
class Served:
    """What a rank has done."""

    tokens: int = 0
    joint: int = 0
    alone: int = 0
    vain_us: float = 0
    patient_from: tuple[int, ...] = NEW


Steps = Generator[simpy.Event, object, None]


def decode(group: Group, rank: int, rows: int, served: Served) -> Steps:
    """One small forward, as `Meeting.meet` runs it."""
    env, start = group.env, int(group.env.now)

    def deadline() -> int:
        return deadline_us(group.state, rank, rows, start, TIMES, served.patient_from)

    entered = group.state.enter(rank, rows)
    if group.exchange and (entered.joint_of(rank) is not None or deadline() > start):
        group.change(entered)
    while group.state.seats[rank].phase is Phase.ENTERED:
        if deadline() <= env.now:
            group.change(group.state.withdraw(rank))
            served.vain_us += env.now - start
            state, patient = group.state, served.patient_from[: len(group.state.seats)]
            served.patient_from = after_waiting(state, rank, int(env.now), int(env.now) - start, patient)
        else:
            yield env.any_of([group.changed, env.timeout(deadline() - env.now)])
    if (joint := group.state.joint_of(rank)) and group.exchange:
        served.joint += 1
        yield env.timeout(TIMES.joint_us(joint.bucket))
        group.change(group.state.publish(rank, 0))
    else:
        served.alone += 1
        group.change(group.state.publish(rank, int(env.now + TIMES.alone_us(rows))))
        yield env.timeout(TIMES.alone_us(rows))
    served.tokens += rows


def serve(group: Group, rank: int, flight: int, new: int, served: Served, rng: random.Random) -> Steps:
    """A closed loop: each sequence that ends is followed by another, whose prompt is prefilled first."""
    env = group.env
    waiting = flight
    running: list[int] = []
    while True:
        if waiting:
            taken = min(waiting, 2)
            waiting -= taken
            time = PREFILL_US * taken / 2
            group.change(group.state.publish(rank, int(env.now + time)))
            yield env.timeout(time)
            running += [rng.randint(new // 2, new) for _ in range(taken)]
            continue
        yield from decode(group, rank, len(running), served)
        running = [left - 1 for left in running if left > 1]
        waiting = flight - len(running)


def simulate(size: int, flight: int, new: int, *, exchange: bool) -> list[Served]:
    env = simpy.Environment()
    group = Group(env, Round.start(size), exchange)
    all_served = [Served() for _ in range(size)]
    for rank, served in enumerate(all_served):
        env.process(serve(group, rank, flight, new, served, random.Random(rank)))
    env.run(until=20e6)
    return all_served


@pytest.mark.parametrize(("size", "flight", "new", "gain"), [(2, 24, 64, 1.3), (2, 24, 256, 2.0), (4, 16, 256, 1.5)])
def test_waiting_pays_under_load(size: int, flight: int, new: int, gain: float) -> None:
    with_exchange, without = (simulate(size, flight, new, exchange=on) for on in (True, False))
    tokens, before = (sum(served.tokens for served in each) for each in (with_exchange, without))
    assert tokens > gain * before
    assert all(served.joint > served.alone for served in with_exchange)
    assert len({served.joint for served in with_exchange}) <= 2  # equal, but for a round under way at the end


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_peer_that_never_comes_costs_little(rows: int) -> None:
    env = simpy.Environment()
    group, served = Group(env, Round.start(2), exchange=True), Served()

    def only() -> Steps:
        while True:
            yield from decode(group, 0, rows, served)

    env.process(only())
    env.run(until=20e6)
    assert served.joint == 0
    assert served.vain_us <= 20e6 / PATIENCE + TIMES.alone_us(rows)
    assert served.alone * TIMES.alone_us(rows) >= 20e6 * (1 - 1 / PATIENCE) - 2 * TIMES.alone_us(rows)
