"""A peer that ends without a word is noticed; one that says so is not."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable

import pytest

from sglang_dwdp.memory.places import TcpPlace
from sglang_dwdp.memory.presence import Presence


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    place = TcpPlace.open("127.0.0.1")
    listener = place.listen()
    here = place.visit(5)
    there, _ = listener.accept()
    listener.close()
    place.close()
    return here, there


def left(connection: socket.socket) -> None:
    Presence({0: connection}, lambda _rank: None).leave()


@pytest.mark.parametrize(("end", "expected"), [(socket.socket.close, [2]), (left, [])])
def test_who_is_missed(end: Callable[[socket.socket], None], expected: list[int]) -> None:
    missed: queue.Queue[int] = queue.Queue()
    ends = {rank: pair() for rank in (2, 5)}
    presence = Presence({rank: here for rank, (here, _) in ends.items()}, missed.put)
    end(ends[2][1])
    time.sleep(0.2)
    ends[5][1].close()
    assert [missed.get(timeout=5) for _ in range(len(expected) + 1)] == [*expected, 5]
    presence.leave()
    assert missed.empty()


def test_a_rank_that_leaves_misses_nobody() -> None:
    missed: queue.Queue[int] = queue.Queue()
    here, there = pair()
    presence = Presence({1: here}, missed.put)
    presence.leave()
    presence.leave()
    there.close()
    time.sleep(0.2)
    assert missed.empty()
