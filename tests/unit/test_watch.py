"""Conditions of ranks over time, with a clock that a test sets."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_dwdp.watch import Condition, RankState, Watch, living, serving, status

NOON = 1_700_000_000.0  # 2023-11-14T22:13:20Z


class Time:
    now = 0.0

    def watch(self, size: int = 3) -> Watch:
        return Watch(size, silent_s=5.0, clock=lambda: self.now, wall=lambda: NOON + self.now)


def conditions(states: Sequence[RankState]) -> str:
    return "".join({"serving": "S", "not responding": "-", "lost": "x"}[state.condition] for state in states)


def test_ranks_that_give_signs_of_life_serve() -> None:
    time = Time()
    watch = time.watch()
    before = watch.states
    for time.now in range(20):
        assert watch.look({}, [], [time.now, time.now, time.now]) == []
    assert watch.states is before  # there is nothing to tell anybody
    assert status(watch.states) == "3 of 3 ranks serve"


def test_a_lost_rank_is_named_once_and_stays_lost() -> None:
    time = Time()
    watch = time.watch()
    [(rank, state)] = watch.look({1: "was ended by SIGKILL"}, [], [1, 1, 1])
    assert (rank, state.condition, state.since) == (1, Condition.LOST, NOON)
    time.now = 3
    assert watch.look({1: "was ended by SIGKILL"}, [1], [2, 2, 2]) == []
    assert watch.look({}, [], [3, 3, 3]) == []
    assert status(watch.states) == "degraded: rank 1 of 3 lost at 2023-11-14T22:13:20Z (was ended by SIGKILL)"
    assert (serving(watch.states), living(watch.states)) == ([True, False, True], [True, False, True])


def test_a_stopped_rank_does_not_respond_until_it_goes_on() -> None:
    watch = Time().watch()
    [(rank, state)] = watch.look({}, [2], [1, 1, 1])
    assert (rank, state.why) == (2, "its process is stopped")
    assert (serving(watch.states), living(watch.states)) == ([True, True, False], [True, True, True])
    assert [rank for rank, _ in watch.look({}, [], [1, 1, 1])] == [2]
    assert conditions(watch.states) == "SSS"


def test_a_stuck_rank_does_not_respond_until_its_next_sign_of_life() -> None:
    time = Time()
    watch = time.watch()
    seen = []
    for time.now in range(1, 13):
        watch.look({}, [], [time.now, None if time.now == 3 else 1 if time.now < 11 else 2, time.now])
        seen.append(conditions(watch.states))
    # Silent since second 1, so for more than 5 at second 7.
    assert seen == ["SSS"] * 6 + ["S-S"] * 4 + ["SSS"] * 2


def test_where_no_rank_responds_requests_go_to_those_that_live() -> None:
    time = Time()
    watch = time.watch()
    watch.look({0: "ended"}, [1], [0, 0, 0])
    assert conditions(watch.states) == "x-S"
    time.now = 9
    watch.look({0: "ended"}, [1], [0, 0, 0])
    assert conditions(watch.states) == "xSS"
    watch.look({0: "ended"}, [1], [0, 0, 1])
    assert conditions(watch.states) == "x-S"


def test_a_rank_that_does_not_respond_can_be_lost() -> None:
    watch = Time().watch()
    watch.look({}, [0], [0, 0, 0])
    watch.look({0: "was ended by SIGKILL"}, [], [0, 0, 0])
    assert conditions(watch.states) == "xSS"
