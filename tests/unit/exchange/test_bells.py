"""Bells: a rank that waits wakes an idle one that sleeps as SGLang's scheduler does."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import zmq

from sglang_dwdp.exchange.bells import Bells, create
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.page import Page
from sglang_dwdp.exchange.page import create as create_page
from sglang_dwdp.exchange.round import Phase, Round, Seat
from tests.unit.exchange.processes import PATIENT


def test_a_rank_that_waits_wakes_one_that_sleeps() -> None:
    page_fd, fds = create_page(), [create(), create()]
    meetings = [Meeting(Page(page_fd, rank, 2), PATIENT, Bells([os.dup(fd) for fd in fds], rank)) for rank in range(2)]
    busy, idle = meetings
    poller = zmq.Poller()
    assert idle.bells is not None
    poller.register(idle.bells.fileno(), zmq.POLLIN)
    assert idle.help() is None
    with ThreadPoolExecutor(2) as pool:
        asleep = pool.submit(poller.poll, 20_000)
        start = time.monotonic()
        waiting = pool.submit(busy.meet, 3)
        assert asleep.result()
        assert time.monotonic() - start < 10
        met = idle.help()
        assert waiting.result() == met
    assert met is not None
    assert met.buckets == (3, 0)
    idle.bells.silence()
    assert poller.poll(0) == []
    idle.bells.silence()  # nothing has rung
    for fd in (page_fd, *fds):
        os.close(fd)
    for meeting in meetings:
        meeting.close()
        meeting.close()


def test_only_ranks_that_may_be_idle_are_woken() -> None:
    seats = (Seat(Phase.ENTERED, 4), Seat(back_us=100), Seat(back_us=5), Seat(Phase.JOINT), Seat(Phase.GONE))
    state = Round(seats, Round.start(5).last)
    assert state.sleepers(50) == [2, 3]
    assert state.sleepers(100) == [1, 2, 3]
