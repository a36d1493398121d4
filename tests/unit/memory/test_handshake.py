"""The control plane: ranks are threads here, which sockets do not tell from processes."""

import os
import socket
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.memory.handshake import _DATA, _FAILED, Exchange
from sglang_dwdp.memory.messages import HEADER, MAX_FDS, close_fds, pack, unpack


def run_ranks(size: int, step: Callable[[Exchange], Any], timeout_s: float = 10.0) -> list[Any]:
    """The result of `step` on every rank, an exception where it raised."""
    name = uuid.uuid4().hex

    def one(rank: int) -> Any:
        exchange = Exchange(name, rank, size, timeout_s)
        try:
            exchange.connect()
            return step(exchange)
        except Exception as error:  # noqa: BLE001  (it is the result)
            return error
        finally:
            exchange.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_gather_keeps_rank_order(size: int) -> None:
    results = run_ranks(size, lambda x: [x.all_gather(f"{x.rank}.{turn}".encode()) for turn in range(3)])
    expected = [[f"{rank}.{turn}".encode() for rank in range(size)] for turn in range(3)]
    assert results == [expected] * size


def test_payloads_larger_than_a_socket_buffer() -> None:
    results = run_ranks(3, lambda x: x.all_gather(bytes([x.rank]) * (1 << 22)))
    for answers in results:
        assert [(a[0], len(a)) for a in answers] == [(rank, 1 << 22) for rank in range(3)]


def test_descriptors_reach_every_peer_and_none_is_left_open() -> None:
    before = open_fds()

    def step(x: Exchange) -> list[list[bytes]]:
        own = []
        for index in range(x.rank + 1):  # ranks may send different numbers
            fd = os.memfd_create("t")
            os.write(fd, f"{x.rank}.{index}".encode())
            own.append(fd)
        received = x.all_gather_fds(own)
        x.barrier()
        close_fds(own)
        assert received[x.rank] == []
        contents = [[os.pread(fd, 100, 0) for fd in fds] for fds in received]
        assert all(not os.get_inheritable(fd) for fds in received for fd in fds)
        close_fds([fd for fds in received for fd in fds])
        return contents

    results = run_ranks(3, step)
    for rank, contents in enumerate(results):
        assert contents == [
            [] if peer == rank else [f"{peer}.{i}".encode() for i in range(peer + 1)] for peer in range(3)
        ]
    assert open_fds() == before


@pytest.mark.parametrize("count", [MAX_FDS, MAX_FDS + 1, 2 * MAX_FDS + 3])
def test_more_descriptors_than_the_kernel_takes_in_a_message(count: int) -> None:
    before = open_fds()

    def step(x: Exchange) -> list[int]:
        fd = os.memfd_create("t")
        fds = [fd] * (count if x.rank == 2 else x.rank)
        answers = x.swap(bytes([x.rank]) * 10_000, fds)
        assert [answer for answer, _ in answers] == [bytes([rank]) * 10_000 for rank in range(3)]
        counts = [len(received) for _, received in answers]
        close_fds([fd, *(fd for _, received in answers for fd in received)])
        return counts

    assert run_ranks(3, step) == [[0, 1, count], [0, 0, count], [0, 1, 0]]
    assert open_fds() == before


@settings(max_examples=25)
@given(st.lists(st.tuples(st.binary(max_size=20), st.integers(0, 3)), min_size=1, max_size=5))
def test_everybody_gets_what_everybody_gave(given: list[tuple[bytes, int]]) -> None:
    before = open_fds()

    def step(x: Exchange) -> list[tuple[bytes, list[bytes]]]:
        payload, count = given[x.rank]
        fds = []
        for index in range(count):
            fds.append(os.memfd_create("t"))
            os.write(fds[-1], f"{x.rank}.{index}".encode())
        answers = x.swap(payload, fds)
        found = [(answer, [os.pread(fd, 9, 0) for fd in received]) for answer, received in answers]
        close_fds([*fds, *(fd for _, received in answers for fd in received)])
        return found

    for rank, found in enumerate(run_ranks(len(given), step)):
        assert found == [
            (payload, [f"{peer}.{index}".encode() for index in range(count if peer != rank else 0)])
            for peer, (payload, count) in enumerate(given)
        ]
    assert open_fds() == before


@given(st.lists(st.binary(max_size=5)), st.integers(0, 40))
def test_parts_are_packed_as_one_and_a_piece_of_it_is_not_taken_for_it(parts: list[bytes], end: int) -> None:
    data = pack(parts)
    assert unpack(data) == parts
    try:
        assert pack(unpack(data[:end])) == data[:end]
    except DwdpSetupError:
        assert end < len(data)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_messages_of_a_step(size: int) -> None:
    def step(x: Exchange) -> int:
        x.barrier()
        return x.sent

    assert sum(run_ranks(size, step)) == 2 * (size - 1)


def test_a_rank_that_does_not_come_is_named() -> None:
    name = uuid.uuid4().hex
    with pytest.raises(DwdpSetupError, match=r"rank 0: ranks \[1, 2\] did not come within 0.2 s"):
        Exchange(name, 0, 3, 0.2).connect()
    with pytest.raises(DwdpSetupError, match=r"rank 1: rank 0 did not come within 0.2 s, or had given up"):
        Exchange(name, 1, 3, 0.2).connect()


def test_a_failure_reaches_all_peers_with_its_reason() -> None:
    def step(x: Exchange) -> None:
        if x.rank == 1:
            x.fail("layer 3, w2_weight: no space")
        else:
            x.barrier()

    first, _, last = run_ranks(3, step)
    for result in (first, last):
        assert isinstance(result, DwdpSetupError)
        assert "rank 1 failed: layer 3, w2_weight: no space" in str(result)


def test_the_failure_of_two_ranks_reaches_all_with_both_reasons() -> None:
    """The first of them may only be the consequence of the other one."""
    has_failed = threading.Event()

    def step(x: Exchange) -> None:
        if x.rank == 2:
            x.fail("no space")
            has_failed.set()
        else:
            has_failed.wait(10)
        if x.rank == 1:
            x.fail("no such file")
        if x.rank in (0, 3):
            x.barrier()

    for result in run_ranks(4, step)[::3]:
        assert "rank 1 failed: no such file; rank 2 failed: no space" in str(result)


def test_what_a_peer_said_is_heard_at_any_time() -> None:
    said = threading.Event()

    def step(x: Exchange) -> None:
        x.check_failed()  # nobody has
        x.barrier()
        if x.rank == 1:
            x.fail("no space")
            said.set()
        else:
            said.wait(10)
            x.check_failed()

    first, _ = run_ranks(2, step)
    assert str(first) == "rank 1 failed: no space"


def test_a_rank_that_ends_without_a_word_is_noticed() -> None:
    first, _ = run_ranks(2, lambda x: x.barrier() if x.rank == 0 else None)
    assert "rank 0: lost rank 1: its process ended or gave up" in str(first)


def test_a_rank_that_hangs_is_noticed_in_time() -> None:
    done = threading.Event()

    def step(x: Exchange) -> None:
        if x.rank == 0:
            try:
                x.barrier()
            finally:
                done.set()
        else:
            done.wait(10)

    first, _ = run_ranks(2, step, timeout_s=0.3)
    assert "lost rank 1: no answer within 0.3 s" in str(first)


def test_no_socket_file_is_made(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_ranks(2, lambda x: x.all_gather(b"a")) == [[b"a", b"a"]] * 2
    assert list(tmp_path.iterdir()) == []


def test_descriptors_that_come_with_a_failure_or_unasked_are_closed() -> None:
    """A peer says that it failed, and sends a descriptor with it; or sends one where only a payload is expected."""

    def step(x: Exchange, kind: int) -> None:
        if x.rank == 1:
            fd = os.memfd_create("t")
            x._send(0, kind, b"rank 1 failed", [fd])
            close_fds([fd])
            if kind == _DATA:
                x._receive(0, 1.0)
        else:
            x.all_gather(b"")

    for kind in (_FAILED, _DATA):
        before = open_fds()
        first, _ = run_ranks(2, lambda x, kind=kind: step(x, kind))
        assert ("rank 1 failed" in str(first)) == (kind == _FAILED)
        assert open_fds() == before


def test_descriptors_of_a_garbled_message_are_closed() -> None:
    def step(x: Exchange) -> None:
        if x.rank == 1:
            fd = os.memfd_create("t")
            socket.send_fds(x._peers[0], [HEADER.pack(_DATA, 0, 2)], [fd])  # two announced, one sent
            close_fds([fd])
        else:
            x.barrier()

    before = open_fds()
    first, _ = run_ranks(2, step)
    assert "1 of 2 descriptors arrived" in str(first)
    assert open_fds() == before
