"""The round: every interleaving of few ranks, and random ones of more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_dwdp.exchange.round import MAX_DECODE_ROWS, Joint, Phase, Round, Seat

PREFILL = MAX_DECODE_ROWS + 1


@dataclass(frozen=True)
class Rank:
    """A rank as it sees itself: it learns of a joint round only by looking.

    Attributes:
        attempts: How many times it may enter from now on.
        since: The last round's number when it entered; None while it has not.
        log: The joint rounds that it ran.
    """

    attempts: int
    since: int | None = None
    log: tuple[Joint, ...] = ()
    dead: bool = False


@dataclass(frozen=True)
class World:
    """All ranks, the state between them, and the joint rounds that an onlooker saw."""

    round: Round
    ranks: tuple[Rank, ...]
    history: tuple[Joint, ...] = ()

    def change(self, index: int, rank: Rank, state: Round) -> World:
        new = state.last.number != self.round.last.number
        ranks = (*self.ranks[:index], rank, *self.ranks[index + 1 :])
        return World(state, ranks, (*self.history, state.last) if new else self.history)

    def enter(self, index: int, bucket: int) -> World:
        rank = self.ranks[index]
        state = self.round.enter(index, bucket)
        if state.ended:
            assert state.joint_of(index) is None
            return self.change(index, replace(rank, attempts=rank.attempts - 1), state)
        return self.change(index, replace(rank, attempts=rank.attempts - 1, since=self.round.last.number), state)

    def look(self, index: int) -> World:
        joint = self.round.joint_of(index)
        return self._result(index, self.round, joint) if joint else self

    def withdraw(self, index: int) -> World:
        state = self.round.withdraw(index)
        return self._result(index, state, state.joint_of(index))

    def _result(self, index: int, state: Round, joint: Joint | None) -> World:
        rank = self.ranks[index]
        if joint is None:
            # It runs alone, so nobody may be joint in the attempt that it gave up.
            assert rank.since == len(self.history)
            return self.change(index, replace(rank, since=None), state)
        return self.change(index, replace(rank, since=None, log=(*rank.log, joint)), state)

    def publish(self, index: int, back_us: int) -> World:
        return self.change(index, self.ranks[index], self.round.publish(index, back_us))

    def die(self, index: int) -> World:
        return self.change(index, replace(self.ranks[index], dead=True), self.round.depart(index))

    def check(self) -> None:
        """All ranks agree on number, members and bucket of every round, in one order."""
        assert [joint.number for joint in self.history] == list(range(1, len(self.history) + 1))
        for index, rank in enumerate(self.ranks):
            pending = self.history[-1:] if rank.since is not None and self.round.joint_of(index) else ()
            seen = (*rank.log, *pending)
            assert seen == (self.history[: len(seen)] if rank.dead else self.history)
        for joint in self.history:
            assert len(joint.buckets) == len(self.ranks)
            assert joint.bucket > 0
            assert len({bucket >= PREFILL for bucket in joint.buckets if bucket}) == 1  # decodes, or prefills
        assert self.round.ended == any(rank.dead for rank in self.ranks)

    def next(self, buckets: tuple[int, ...], deaths: bool) -> Iterator[World]:
        """Everything that may happen now."""
        for index, rank in enumerate(self.ranks):
            if rank.dead:
                continue
            if deaths:
                yield self.die(index)
            if rank.since is not None:
                yield self.look(index)
                yield self.withdraw(index)
            elif rank.attempts:
                yield from (self.enter(index, bucket) for bucket in buckets)


@pytest.mark.parametrize(("size", "attempts", "buckets"), [(2, 3, (0, 1, 2)), (2, 3, (0, 1, PREFILL)), (3, 2, (0, 1))])
def test_every_interleaving_is_safe(size: int, attempts: int, buckets: tuple[int, ...]) -> None:
    start = World(Round.start(size), (Rank(attempts),) * size)
    seen, todo = {start}, [start]
    most = 0
    while todo:
        world = todo.pop()
        world.check()
        most = max(most, len(world.history))
        for after in world.next(buckets, deaths=True):
            if after not in seen:
                seen.add(after)
                todo.append(after)
    assert most == attempts  # rounds did become joint
    assert len(seen) > 1000


class Interleavings(RuleBasedStateMachine):
    """2 to 8 ranks that arrive, withdraw, look, go away and die as they like."""

    world: World

    @initialize(size=st.integers(2, 8))
    def start(self, size: int) -> None:
        self.world = World(Round.start(size), (Rank(attempts=10**6),) * size)

    def pick(self, data: st.DataObject, entered: bool) -> int | None:
        ranks = [i for i, r in enumerate(self.world.ranks) if not r.dead and (r.since is not None) is entered]
        return data.draw(st.sampled_from(ranks)) if ranks else None

    @rule(data=st.data(), bucket=st.sampled_from((0, 1, 2, 64, PREFILL, 1024)))
    def arrive(self, data: st.DataObject, bucket: int) -> None:
        if (index := self.pick(data, entered=False)) is not None:
            self.world = self.world.enter(index, bucket)

    @rule(data=st.data(), late=st.booleans())
    def arrive_together(self, data: st.DataObject, late: bool) -> None:
        """All but perhaps one, so that joint rounds are not rare in large groups."""
        ranks = [i for i, r in enumerate(self.world.ranks) if not r.dead and r.since is None]
        for index in ranks[: len(ranks) - late]:
            self.world = self.world.enter(index, data.draw(st.sampled_from((0, 1, 2, 3, 4, PREFILL))))

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        if (index := self.pick(data, entered=True)) is not None:
            self.world = self.world.look(index)

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        if (index := self.pick(data, entered=True)) is not None:
            self.world = self.world.withdraw(index)
            assert self.world.ranks[index].since is None  # nobody is held against its will

    @rule(data=st.data(), back_us=st.integers(0, 10**6))
    def go_away(self, data: st.DataObject, back_us: int) -> None:
        if (index := self.pick(data, entered=False)) is not None:
            self.world = self.world.publish(index, back_us)

    @precondition(lambda self: len(self.world.history) > 2)
    @rule(data=st.data(), entered=st.booleans())
    def die(self, data: st.DataObject, entered: bool) -> None:
        if (index := self.pick(data, entered)) is not None:
            self.world = self.world.die(index)

    @invariant()
    def safe(self) -> None:
        self.world.check()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_largest_bucket_counts_and_idle_ranks_help() -> None:
    state = Round.start(3).enter(0, 4)
    assert state.wants_help(1)
    assert not state.wants_help(0)
    state = state.enter(1, 0)
    assert state.joint_of(0) is None
    state = state.enter(2, 16)
    joint = Joint(1, (4, 0, 16))
    assert [state.joint_of(rank) for rank in range(3)] == [joint] * 3
    assert joint.bucket == 16
    # The first to come back does not take the round from those who have yet to look.
    assert state.enter(0, 2).joint_of(1) == joint


def test_ranks_that_decode_help_a_prefill_first() -> None:
    state = Round.start(3).enter(0, 8).enter(1, PREFILL).enter(2, 0)
    assert state.joint_of(0) == Joint(1, (0, PREFILL, 0))
    state = state.enter(0, 8).publish(1, 100).enter(2, 4)
    assert state.joint_of(0) is None
    assert state.enter(1, 1).joint_of(0) == Joint(2, (8, 1, 4))


def test_idle_ranks_alone_make_no_round() -> None:
    state = Round.start(2).enter(0, 0)
    assert not state.wants_help(1)
    assert state.enter(1, 0).last.number == 0


def test_a_departure_sets_waiting_ranks_free_for_good() -> None:
    state = Round.start(3).enter(0, 1).enter(1, 1).depart(2)
    assert state.ended
    assert [seat.phase for seat in state.seats] == [Phase.AWAY, Phase.AWAY, Phase.GONE]
    assert state.enter(0, 1) == state
    joint = Round.start(2).enter(0, 1).enter(1, 1).depart(1)
    assert joint.joint_of(0)
    assert joint.enter(0, 1).joint_of(0) is None  # the round of before is over
    assert state.publish(2, 5).seats[2].phase is Phase.GONE
    assert not state.wants_help(1)


def test_a_round_stays_joint_for_those_who_live() -> None:
    state = Round.start(2).enter(0, 1).enter(1, 2).depart(1)
    assert state.withdraw(0).joint_of(0) == Joint(1, (1, 2))


def test_what_is_published_is_kept_until_the_rank_enters() -> None:
    state = Round.start(2).publish(1, 70)
    assert state.seats[1] == Seat(Phase.AWAY, 0, 70)
    assert state.enter(1, 8).seats[1] == Seat(Phase.ENTERED, 8, 0)


@pytest.mark.parametrize("misuse", [lambda s: s.enter(0, 1), lambda s: s.publish(0, 1), lambda s: s.enter(1, -1)])
def test_misuse_is_an_error(misuse: object) -> None:
    with pytest.raises(ValueError, match="rank"):
        misuse(Round.start(2).enter(0, 1))  # type: ignore[operator]
