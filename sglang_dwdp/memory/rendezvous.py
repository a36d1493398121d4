"""How the ranks of a group find each other: rank 0 listens, the others visit it, and both prove the group's secret.

```
a rank                                       rank 0, which listens
  its rank, a random challenge        ─▶
                                      ◀─     a random challenge, proof
  verify, proof                       ─▶     verify
```

A proof is an HMAC of both challenges, both ranks and the side that speaks, so that it fits one connection and one
direction. The secret itself is never sent. Whoever connects may be a stranger: the names of Unix sockets can be read on
the host, and ports are open to the network. Strangers, impostors and second claimants are hung up on, and the ranks go
on waiting for their peers until the deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import selectors
import socket
import struct
import time

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.memory.messages import receive
from sglang_dwdp.memory.places import Place

_CHALLENGE_BYTES = 32
_CLAIM = struct.Struct(f"!I{_CHALLENGE_BYTES}s")
_ANSWER = struct.Struct(f"!{_CHALLENGE_BYTES}s{hashlib.sha256().digest_size}s")
_RETRY_S = 0.01
_MAX_STRANGERS = 256  # connections that have proven nothing; beyond them the oldest is closed


def _mac(secret: str, message: bytes) -> bytes:
    return hmac.new(secret.encode(), message, hashlib.sha256).digest()


def _proofs(secret: str, listener: int, visitor: int, listeners: bytes, visitors: bytes) -> tuple[bytes, bytes]:
    """The listener's and the visitor's proof for one connection, from both sides' challenges."""
    said = f" {listener} {visitor} ".encode() + listeners + visitors
    return _mac(secret, b"listener" + said), _mac(secret, b"visitor" + said)


class _ImpostorError(OSError):
    """The other side is not the rank that it claims to be, or not one that is awaited."""


def meet(secret: str, rank: int, size: int, timeout_s: float, peers: dict[int, socket.socket], place: Place) -> None:
    """Connect rank 0 with all others.

    Args:
        secret: The same on all ranks of the group, and known to nobody else.
        rank: This process's rank.
        size: Ranks of the group.
        timeout_s: Seconds until a peer that has not come is an error.
        peers: Gets rank 0's connection with each of the others, as soon as it is met; elsewhere the one with rank 0.
        place: Where rank 0 listens.

    Raises:
        DwdpSetupError: A peer did not come in time. It is named; `peers` has those that did come.
    """
    deadline = time.monotonic() + timeout_s
    if rank:
        peers[0] = _visit(secret, rank, timeout_s, deadline, place)
        return
    try:
        listener = place.listen()
    except OSError as error:
        raise DwdpSetupError(
            f"rank {rank}: cannot listen for its peers ({error}). Is there a second process of this rank?"
        ) from error
    with listener:
        _receive_peers(secret, size, timeout_s, deadline, listener, peers, place)
    for connection in peers.values():
        connection.setblocking(True)


def _visit(secret: str, rank: int, timeout_s: float, deadline: float, place: Place) -> socket.socket:
    met_stranger, last = False, ""
    while True:
        connection: socket.socket | None = None
        try:
            connection = place.visit(max(deadline - time.monotonic(), _RETRY_S))
            if not place.admits(connection):
                raise _ImpostorError
            _introduce(secret, rank, connection)
        except OSError as error:
            if connection is not None:
                connection.close()
            met_stranger |= isinstance(error, _ImpostorError)
            last = str(error) or last
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        else:
            return connection
        if time.monotonic() > deadline:
            found = " Another process listens in its place." if met_stranger else ""
            where = f" at {place}" + f" ({last})" * bool(last) if str(place) else ""
            raise DwdpSetupError(
                f"rank {rank}: rank 0 did not come within {timeout_s:g} s{where}, or had given up.{found}"
            )
        time.sleep(_RETRY_S)


def _introduce(secret: str, rank: int, connection: socket.socket) -> None:
    """The visitor's side of the proof."""
    challenge = secrets.token_bytes(_CHALLENGE_BYTES)
    connection.sendall(_CLAIM.pack(rank, challenge))
    listeners, proof = _ANSWER.unpack(receive(connection, _ANSWER.size))
    expected, own = _proofs(secret, 0, rank, listeners, challenge)
    if not hmac.compare_digest(proof, expected):
        raise _ImpostorError
    connection.sendall(own)


class _Visitor:
    """The listener's side of the proof, one message at a time, so that a mute visitor keeps nobody waiting."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.rank = -1
        self._received = b""
        self._expected = b""

    def read(self, secret: str, awaited: set[int]) -> bool:
        """Take what has arrived; True when the visitor has proven to be an awaited rank.

        Raises:
            OSError: It has left, or is an impostor.
        """
        wanted = len(self._expected) or _CLAIM.size
        piece = self.connection.recv(wanted - len(self._received))
        if not piece:
            raise ConnectionResetError
        self._received += piece
        if len(self._received) < wanted:
            return False
        if self._expected:
            if self.rank not in awaited or not hmac.compare_digest(self._received, self._expected):
                raise _ImpostorError
            return True
        self.rank, visitors = _CLAIM.unpack(self._received)
        if self.rank not in awaited:
            raise _ImpostorError
        challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        own, self._expected = _proofs(secret, 0, self.rank, challenge, visitors)
        self._received = b""
        self.connection.sendall(_ANSWER.pack(challenge, own))
        return False


def _receive_peers(
    secret: str,
    size: int,
    timeout_s: float,
    deadline: float,
    listener: socket.socket,
    peers: dict[int, socket.socket],
    place: Place,
) -> None:
    awaited = set(range(1, size))
    visitors: dict[socket.socket, None] = {}  # those that have proven nothing yet, the oldest first
    with contextlib.ExitStack() as leaving, selectors.DefaultSelector() as selector:
        leaving.callback(lambda: list(map(socket.socket.close, visitors)))

        def let_go(connection: socket.socket) -> socket.socket:
            selector.unregister(connection)
            del visitors[connection]
            return connection

        selector.register(listener, selectors.EVENT_READ)
        while awaited:
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if time.monotonic() > deadline:
                raise DwdpSetupError(f"rank 0: ranks {sorted(awaited)} did not come within {timeout_s:g} s.")
            for key, _ in ready:
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    if not place.admits(connection):
                        connection.close()
                        continue
                    if len(visitors) == _MAX_STRANGERS:
                        let_go(next(iter(visitors))).close()
                    visitors[connection] = None
                    selector.register(connection, selectors.EVENT_READ, _Visitor(connection))
                    continue
                visitor: _Visitor = key.data
                if visitor.connection not in visitors:
                    continue
                try:
                    is_proven = visitor.read(secret, awaited)
                except OSError:
                    let_go(visitor.connection).close()
                    continue
                if is_proven:
                    awaited.remove(visitor.rank)
                    peers[visitor.rank] = let_go(visitor.connection)
