"""The page of rounds between processes: locks, deaths, stops, and many rounds."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpRuntimeError, DwdpSetupError
from sglang_dwdp.exchange import lock as locks
from sglang_dwdp.exchange import page as pages
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.page import Page, create, share_page
from sglang_dwdp.exchange.policy import PATIENCE, StepTimes
from sglang_dwdp.exchange.round import Joint, Phase, Round
from tests.unit.exchange.processes import HASTY, PATIENT, answer, open_meeting, ranks

ROUNDS = 10_000
LASTING = StepTimes(alone=((1, 5000.0),), joint=((1, 0.0),))
SECONDS = 6.0  # a slow machine makes fewer rounds in the time


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = create()
    yield descriptor
    os.close(descriptor)


def test_the_state_is_the_same_for_all(fd: int) -> None:
    with_pages = [Page(fd, rank, 3) for rank in range(3)]
    first, second, third = with_pages
    before = second.version
    first.change(lambda state: state.publish(0, 2**40).enter(1, 5))
    assert second.version == before + 1
    seen = second.change(lambda state: state)
    assert seen == Round.start(3).publish(0, 2**40).enter(1, 5)
    assert second.version == second.seen == before + 1  # looking is no change
    third.change(lambda state: state.enter(0, 7).enter(2, 0))
    assert [page.change(lambda s: s).joint_of(page.rank) for page in with_pages] == [Joint(1, (7, 5, 0))] * 3
    assert first.lost() == []
    third.close()
    third.close()
    assert first.lost() == [2]
    first.close()
    second.close()


def test_an_update_that_fails_changes_nothing(fd: int) -> None:
    page = Page(fd, 0, 2)
    with pytest.raises(ZeroDivisionError):
        page.change(lambda state: state.enter(0, 1 // 0))
    assert page.change(lambda state: state) == Round.start(2)


def test_a_page_has_one_process_for_each_rank_of_one_group(fd: int) -> None:
    page = Page(fd, 0, 2)
    for rank, size, why in ((0, 2, "another process"), (1, 3, "for 2 ranks"), (2, 2, "rank 2 of 2"), (0, 65, "64")):
        with pytest.raises(DwdpSetupError, match=why):
            Page(fd, rank, size)
    page.close()
    Page(fd, 0, 2).close()


def test_descriptions_of_one_process_exclude_one_another(fd: int) -> None:
    """As record locks of the process would not."""
    first, second = locks.reopen(fd), locks.reopen(fd)
    assert locks.try_lock(first, 0)
    assert not locks.try_lock(second, 0)
    assert locks.try_lock(second, 1)
    os.close(locks.reopen(fd))  # would drop the process's record locks
    assert locks.is_locked(second, 0)
    assert not locks.lock(second, 0, limit_s=0.01)
    locks.unlock(first, 0)
    assert locks.lock(second, 0, limit_s=0.01)
    os.close(first)
    os.close(second)


def test_a_holder_that_is_stopped_is_named(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_LOCK_LIMIT_S", 0.05)
    first, second = Page(fd, 0, 2), Page(fd, 1, 2)

    def stop(state: Round) -> Round:
        with pytest.raises(DwdpRuntimeError, match=r"rank 0: rank 1 has held"):
            first.change(lambda s: s)
        return state

    second.change(stop)
    first.change(lambda state: state)


def test_set_up_hands_one_page_to_all() -> None:
    from sglang_dwdp.memory.handshake import Exchange

    name, found = uuid.uuid4().hex, {}

    def one(rank: int) -> None:
        handshake = Exchange(name, rank, 3, 10)
        handshake.connect()
        found[rank] = share_page(handshake)
        handshake.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    found[0].change(lambda state: state.enter(2, 9))
    assert found[1].change(lambda state: state).seats[2].bucket == 9
    assert found[2].lost() == []
    for page in found.values():
        page.close()


def _hold(pipe: Connection, path: str, rank: int, size: int) -> None:
    meeting = open_meeting(path, rank, size, PATIENT)

    def never(state: Round) -> Round:
        pipe.send("holds")
        time.sleep(60)
        return state.depart(0)

    meeting.page.change(never)


def test_the_lock_of_a_killed_holder_is_released() -> None:
    with ranks(_hold, [(2,)]) as [(process, pipe)]:
        assert answer(pipe) == "holds"
        shared = os.open(f"/proc/{process.pid}/fd/{_memfd(process.pid)}", os.O_RDWR)
        timer = threading.Timer(0.2, process.kill)
        timer.start()
        page = Page(shared, 1, 2)  # waits for the lock until the kernel releases it
        timer.join()
        os.close(shared)
        assert page.change(lambda state: state.enter(1, 3)) == Round.start(2).enter(1, 3)
        process.join(10)
        assert page.lost() == [0]
        page.close()


def _memfd(pid: int | None) -> str:
    directory = f"/proc/{pid}/fd"
    return next(fd for fd in os.listdir(directory) if "sglang-dwdp-round" in os.readlink(f"{directory}/{fd}"))


def _meet_once(pipe: Connection, path: str, rank: int, size: int, times: StepTimes, bucket: int) -> Any:
    meeting = open_meeting(path, rank, size, times)
    pipe.send("there")
    pipe.recv()
    start = time.monotonic()
    joint = meeting.meet(bucket)
    return joint, time.monotonic() - start, meeting.ended, meeting.counters.as_dict()


def _all_there(started: list[Any]) -> None:
    for _, pipe in started:
        assert answer(pipe) == "there"


def test_ranks_meet() -> None:
    with ranks(_meet_once, [(3, PATIENT, bucket) for bucket in (4, 1, 8)]) as started:
        _all_there(started)
        for _, pipe in started:
            pipe.send("go")
        for _, pipe in started:
            joint, _, ended, counters = answer(pipe)
            assert joint == Joint(1, (4, 1, 8))
            assert not ended
            assert counters["joint_rounds"] == 1


def test_a_rank_killed_while_it_waits_takes_part_in_nothing() -> None:
    with ranks(_meet_once, [(3, PATIENT, 1)] * 3) as started:
        _all_there(started)
        (dead, pipe), *living = started
        pipe.send("go")
        time.sleep(0.2)  # it has entered
        dead.kill()
        dead.join(10)
        for _, pipe in living:
            pipe.send("go")
        for _, pipe in living:
            joint, seconds, ended, _ = answer(pipe)
            assert joint is None
            assert ended
            assert seconds < 1.5  # nobody waits for its whole budget of 2 s


def test_a_stopped_rank_costs_no_more_than_the_budget() -> None:
    times = StepTimes(alone=((1, 200_000.0),), joint=((1, 0.0),))
    with ranks(_meet_once, [(2, times, 1), (2, PATIENT, 1)]) as started:
        _all_there(started)
        (_, first), (stopped, second) = started
        assert stopped.pid is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        first.send("go")
        second.send("go")
        joint, seconds, ended, counters = answer(first)
        assert joint is None
        assert not ended  # it lives
        assert 0.2 <= seconds < 1.2
        assert counters["withdrawn_rounds"] == 1
        os.kill(stopped.pid, signal.SIGCONT)
        assert answer(second)[0] is None  # its peer has gone meanwhile


def test_a_rank_stopped_while_it_waits_hears_of_the_round_later() -> None:
    with ranks(_meet_once, [(2, PATIENT, 1)] * 2) as started:
        _all_there(started)
        (stopped, first), (_, second) = started
        assert stopped.pid is not None
        first.send("go")
        time.sleep(0.2)
        os.kill(stopped.pid, signal.SIGSTOP)
        second.send("go")
        assert answer(second)[0] == Joint(1, (1, 1))
        time.sleep(0.1)
        os.kill(stopped.pid, signal.SIGCONT)
        assert answer(first)[0] == Joint(1, (1, 1))


def _many(pipe: Connection, path: str, rank: int, size: int, seed: int) -> Any:
    meeting = open_meeting(path, rank, size, LASTING)
    pipe.send("there")
    pipe.recv()
    rng = random.Random(seed)
    log: list[Joint] = []
    start = time.monotonic()
    while len(log) < ROUNDS and time.monotonic() - start < SECONDS:
        if rng.random() < 0.02:
            meeting.go_away(200)
            time.sleep(rng.random() * 400e-6)
        joint = meeting.help() if rng.random() < 0.1 else meeting.meet(rng.randint(1, 64))
        if joint is not None:
            log.append(joint)
    last = meeting.page.change(lambda state: state.depart(rank)).joint_of(rank)
    return log if last is None else [*log, last], meeting.counters.as_dict()


def test_many_rounds_with_random_delays_are_the_same_for_all() -> None:
    with ranks(_many, [(3, seed) for seed in range(3)]) as started:
        _all_there(started)
        for _, pipe in started:
            pipe.send("go")
        logs, counters = zip(*(answer(pipe, 60) for _, pipe in started), strict=True)
    shortest = min(len(log) for log in logs)
    assert shortest > 100
    assert [joint.number for joint in logs[0]] == list(range(1, len(logs[0]) + 1))
    assert all(log[:shortest] == logs[0][:shortest] for log in logs)
    print(f"{shortest} rounds; counters of rank 0: {counters[0]}")  # noqa: T201  (shown with -s)


def _until_killed(pipe: Connection, path: str, rank: int, size: int, seed: int) -> Any:
    meeting = open_meeting(path, rank, size, HASTY)
    pipe.send("there")
    pipe.recv()
    rng = random.Random(seed)
    while not meeting.ended:
        joint = meeting.meet(rng.randint(1, 64))
        if joint is not None:
            pipe.send(joint)
    return "ended"


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_time_ends_joint_rounds_for_those_who_live(seed: int) -> None:
    with ranks(_until_killed, [(3, 10 * seed + rank) for rank in range(3)]) as started:
        _all_there(started)
        for _, pipe in started:
            pipe.send("go")
        time.sleep(random.Random(seed).uniform(0.05, 0.2))
        victim, pipe_of_victim = started[seed]
        victim.kill()
        victim.join(10)
        logs = []
        for _, pipe in started:
            log = []
            try:
                while (said := answer(pipe, 10)) != "ended":
                    log.append(said)
            except EOFError:
                assert pipe is pipe_of_victim
            logs.append(log)
    living = [log for rank, log in enumerate(logs) if rank != seed]
    assert living[0] == living[1]
    assert living[0]
    assert logs[seed] == living[0][: len(logs[seed])]


def test_time_of_a_change(fd: int) -> None:
    """How long one takes here, shown with -s."""
    page = Page(fd, 0, 2)
    start = time.perf_counter()
    for _ in range(500):
        page.change(lambda state: state.enter(0, 1))
        page.change(lambda state: state.withdraw(0))
    print(f"{(time.perf_counter() - start) * 1e3:.1f} us for a change of the page")  # noqa: T201
    assert page.change(lambda state: state).seats[0].phase is Phase.AWAY


def test_an_idle_rank_looks_for_one_read_of_memory(fd: int) -> None:
    idle, busy = Meeting(Page(fd, 0, 2), PATIENT), Meeting(Page(fd, 1, 2), HASTY)
    assert idle.help() is None
    before = idle.page.version
    assert idle.help() is None
    assert busy.meet(4) is None  # waits in vain
    assert idle.page.version > before
    assert idle.help() is None  # too late
    entered = busy.page.change(lambda state: state.enter(1, 4))
    assert entered.wants_help(0)
    assert idle.help() == Joint(1, (0, 4))
    assert idle.counters.helped_rows == 4
    assert busy.page.change(lambda state: state).joint_of(1) == Joint(1, (0, 4))
    busy.close()
    busy.close()
    assert idle.meet(1) is None
    assert idle.ended
    assert idle.help() is None
    idle.close()


def test_a_rank_says_when_it_is_back_and_when_it_is_sooner(fd: int) -> None:
    now = [1000]
    meeting = Meeting(Page(fd, 0, 2), HASTY, clock_us=lambda: now[0])

    def back_us() -> int:
        return meeting.page.change(lambda state: state).seats[0].back_us

    meeting.go_away(300)
    assert back_us() == 1300
    now[0] = 1100
    assert meeting.help() is None
    assert back_us() == 0
    meeting.go_away(300)
    now[0] = 1400
    version = meeting.page.version
    assert meeting.help() is None
    assert meeting.page.version == version  # it is as late as it said, or later
    meeting.close()


def test_a_rank_that_goes_away_helps_those_that_wait_already(fd: int) -> None:
    """They change nothing that it could see later."""
    now = [1000]
    meeting, peer = Meeting(Page(fd, 0, 2), HASTY, clock_us=lambda: now[0]), Page(fd, 1, 2)
    peer.change(lambda state: state.enter(1, 4))
    meeting.go_away(300)
    now[0] = 1400  # as late as it said
    assert meeting.help(wait=False) == Joint(1, (0, 4))
    assert meeting.help(wait=False) is None
    meeting.close()
    peer.close()


@pytest.mark.parametrize(("serves", "away_us"), [(False, 200), (True, 0)])
def test_a_rank_that_runs_alone_is_away_unless_it_serves(fd: int, serves: bool, away_us: int) -> None:
    times = StepTimes(alone=((1, 200.0),), joint=((1, 300.0),))
    meeting = Meeting(Page(fd, 0, 2), times, serves=serves, clock_us=lambda: 1000)
    assert meeting.meet(1) is None
    assert meeting.page.change(lambda state: state).seats[0].back_us == 1000 + away_us
    meeting.close()


def test_a_round_of_all_ends_impatience(fd: int) -> None:
    """A rank that came once may be waited for again, though waiting for it was in vain before."""
    now = [0]

    def clock_us() -> int:
        now[0] += 10
        return now[0]

    times = StepTimes(alone=((1, 300.0),), joint=((1, 100.0),))
    meeting, peer = Meeting(Page(fd, 0, 2), times, clock_us=clock_us), Page(fd, 1, 2)
    assert meeting.meet(1) is None
    assert meeting.counters.withdrawn_rounds == 1
    assert meeting.meet(1) is None
    assert meeting.counters.alone_rounds == 1  # not waited for again so soon
    peer.change(lambda state: state.enter(1, 1))
    assert meeting.meet(1) is not None
    peer.change(lambda state: state.publish(1, 0))
    assert meeting.meet(1) is None
    assert meeting.counters.withdrawn_rounds == 2
    meeting.close()
    peer.close()


def test_a_rank_that_gets_no_core_does_not_blame_its_peers(fd: int) -> None:
    """A second in which the host ran something else is no sign that a peer stays away for long."""
    now = [0]

    def clock_us() -> int:
        now[0] += 1_000_000 if now[0] == 20 else 10
        return now[0]

    times = StepTimes(alone=((1, 300.0),), joint=((1, 100.0),))
    meeting, peer = Meeting(Page(fd, 0, 2), times, clock_us=clock_us), Page(fd, 1, 2)
    assert meeting.meet(1) is None
    assert meeting.counters.round_wait_us > 1_000_000
    now[0] += PATIENCE * 2 * 300  # twice what a forward alone takes
    assert meeting.meet(1) is None
    assert meeting.counters.withdrawn_rounds == 2
    meeting.close()
    peer.close()
