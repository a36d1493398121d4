"""How ranks meet: strangers, impostors and second claimants are hung up on, and the real peers still come.

An attacker here knows where rank 0 listens, which every user of the host or the network can find out, but not the
secret.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.memory import rendezvous
from sglang_dwdp.memory.places import Place, TcpPlace, UnixPlace, own_address
from sglang_dwdp.memory.rendezvous import _ANSWER, _CLAIM, meet

CHALLENGE = bytes(32)


# Hosts of TCP places; None: a Unix socket.
HOSTS = [None, "127.0.0.1", "::1"]


class Group:
    """Ranks as threads that meet under one secret."""

    def __init__(self, pool: ThreadPoolExecutor, size: int, host: str | None) -> None:
        self.secret = uuid.uuid4().hex
        self.met: list[dict[int, socket.socket]] = [{} for _ in range(size)]
        self.place: Any = self._place(host)
        self._pool, self._size, self._host = pool, size, host

    def _place(self, host: str | None) -> Place:
        return UnixPlace(self.secret) if host is None else TcpPlace.open(host)

    def come(self, rank: int, timeout_s: float = 10.0) -> Future[None]:
        return self._pool.submit(meet, self.secret, rank, self._size, timeout_s, self.met[rank], self.place)

    def visit(self) -> socket.socket:
        """A connection with rank 0, of somebody who knows nothing but where it listens."""
        deadline = time.monotonic() + 10
        while True:
            try:
                return self.place.visit(10)
            except ConnectionRefusedError:
                assert time.monotonic() < deadline

    def start_anew(self) -> None:
        self.close()
        self.place = self._place(self._host)

    def close(self) -> None:
        for peers in self.met:
            for connection in peers.values():
                connection.close()
        if isinstance(self.place, TcpPlace):
            self.place.close()


@pytest.fixture(params=HOSTS)
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    with ThreadPoolExecutor(3) as pool:
        made = Group(pool, 2, request.param)
        yield made
        made.close()


def assert_joined(group: Group) -> None:
    """The two ranks speak with each other and with nobody else."""
    group.met[0][1].sendall(b"ping")
    assert group.met[1][0].recv(10) == b"ping"


def is_hung_up(connection: socket.socket) -> bool:
    with connection:
        try:
            return connection.recv(1) == b""
        except ConnectionError:
            return True


def test_the_secret_is_neither_in_the_name_nor_on_the_wire(group: Group) -> None:
    assert group.secret.encode() not in UnixPlace(group.secret).address
    first = group.come(0)
    with group.visit() as stranger:
        stranger.sendall(_CLAIM.pack(1, CHALLENGE))
        answer = stranger.recv(1000)
    assert len(answer) == _ANSWER.size
    assert group.secret.encode() not in answer
    second = group.come(1)
    first.result(), second.result()


def test_strangers_that_say_nothing_or_nonsense_keep_nobody_from_meeting(group: Group) -> None:
    first = group.come(0)
    mute, gone, nonsense = group.visit(), group.visit(), group.visit()
    gone.close()
    nonsense.sendall(b"1" * 200)
    start = time.monotonic()
    second = group.come(1)
    first.result(), second.result()
    assert time.monotonic() - start < 5
    assert_joined(group)
    assert is_hung_up(mute)
    assert is_hung_up(nonsense)


def test_an_impostor_that_claims_to_be_a_peer_gets_nothing(group: Group) -> None:
    first = group.come(0)
    impostor = group.visit()
    impostor.sendall(_CLAIM.pack(1, CHALLENGE))
    _, proof = _ANSWER.unpack(impostor.recv(1000))
    impostor.sendall(proof)  # the listener's own proof, sent back
    assert is_hung_up(impostor)
    assert not first.done()
    second = group.come(1)
    first.result(), second.result()
    assert_joined(group)


def test_what_a_peer_said_once_cannot_be_said_again(group: Group) -> None:
    heard: list[bytes] = []
    real = rendezvous._proofs

    def overheard(*arguments: Any) -> tuple[bytes, bytes]:
        heard.append(real(*arguments)[1])
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendezvous, "_proofs", overheard)
        first, second = group.come(0), group.come(1)
        first.result(), second.result()
    group.start_anew()
    first = group.come(0)
    with group.visit() as replayer:
        replayer.sendall(_CLAIM.pack(1, CHALLENGE))
        replayer.recv(1000)
        replayer.sendall(heard[0])
        assert is_hung_up(replayer)
    second = group.come(1)
    first.result(), second.result()


@pytest.mark.parametrize("rank", [0, 2, 7, 4_000_000_000])
def test_ranks_that_are_not_awaited_are_hung_up_on(group: Group, rank: int) -> None:
    first = group.come(0)
    visitor = group.visit()
    visitor.sendall(_CLAIM.pack(rank, CHALLENGE))
    assert is_hung_up(visitor)
    second = group.come(1)
    first.result(), second.result()


@pytest.mark.parametrize("host", HOSTS)
def test_a_second_claimant_does_not_replace_a_peer(host: str | None) -> None:
    """It knows the secret: a rank that was started twice."""
    with ThreadPoolExecutor(4) as pool:
        group = Group(pool, 3, host)
        first, second = group.come(0, 10), group.come(1, 10)
        second.result()
        deadline = time.monotonic() + 10
        while 1 not in group.met[0] and time.monotonic() < deadline:
            time.sleep(0.01)
        met = group.met[0][1]
        twin: dict[int, socket.socket] = {}
        place = group.place if host is None else TcpPlace(host, group.place.port)
        with pytest.raises(DwdpSetupError, match="rank 0: cannot listen for its peers"):
            meet(group.secret, 0, 3, 0.2, twin, place)
        with pytest.raises(DwdpSetupError, match=r"rank 1: rank 0 did not come within 0.2 s"):
            meet(group.secret, 1, 3, 0.2, twin, group.place)
        third = group.come(2)
        first.result(), third.result()
        assert not twin
        assert group.met[0][1] is met
        assert_joined(group)
        group.close()


def test_another_users_process_is_hung_up_on_and_the_peer_still_comes(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = True
    monkeypatch.setattr(type(group.place), "admits", lambda _place, _connection: not others)
    first = group.come(0)
    assert is_hung_up(group.visit())
    others = False
    second = group.come(1)
    first.result(), second.result()
    assert_joined(group)


def test_users_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair()
    with one, other:
        assert UnixPlace("x").admits(one)
        real = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: real + 1)
        assert not UnixPlace("x").admits(one)


def test_strangers_do_not_pile_up(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_MAX_STRANGERS", 3)
    first = group.come(0)
    strangers = [group.visit() for _ in range(5)]
    assert [is_hung_up(stranger) for stranger in strangers[:2]] == [True, True]
    second = group.come(1)
    first.result(), second.result()
    assert_joined(group)
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("answers", [True, False])
def test_an_impostor_that_listens_in_a_peers_place_gets_no_proof(host: str | None, *, answers: bool) -> None:
    heard = b""
    with ThreadPoolExecutor(1) as pool:
        group = Group(pool, 2, host)
        with group.place.listen() as impostor:
            second = group.come(1, timeout_s=0.5)
            connection, _ = impostor.accept()
            with connection:
                heard += connection.recv(1000)
                if answers:
                    connection.sendall(_ANSWER.pack(CHALLENGE, CHALLENGE))
                    heard += connection.recv(1000)
                else:
                    threading.Event().wait(0.6)  # longer than the visitor's deadline
            with pytest.raises(DwdpSetupError, match=r"rank 1: rank 0 did not come within 0\.5 s") as error:
                second.result()
    group.close()
    assert ("Another process listens in its place" in str(error.value)) == answers
    assert (f"at {group.place}" in str(error.value)) == (host is not None)
    assert len(heard) == _CLAIM.size


def test_a_listener_whose_queue_is_full_is_given_up_in_time() -> None:
    place = UnixPlace(uuid.uuid4().hex)
    with socket.socket(socket.AF_UNIX) as full:
        full.bind(place.address)
        full.listen(0)
        waiting = [place.visit(10)]
        start = time.monotonic()
        with pytest.raises(DwdpSetupError, match="rank 0 did not come within"):
            meet("secret", 1, 2, 0.3, {}, place)
        assert time.monotonic() - start < 3
        for connection in waiting:
            connection.close()


def test_a_place_of_another_host_is_this_hosts_address_on_the_way_there() -> None:
    assert own_address("127.0.0.1", 1) == "127.0.0.1"
    assert own_address("::1", 1) == "::1"
    assert own_address("localhost", 1) in ("127.0.0.1", "::1")
    with pytest.raises(OSError, match=r"."):
        own_address("no-such-host.invalid", 1)
