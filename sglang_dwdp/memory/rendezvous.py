"""How the ranks of a group find each other: sockets that only they can name, and a proof of the group's secret.

```
higher rank                                  lower rank, which listens
  its rank, a random challenge        ─▶
                                      ◀─     a random challenge, proof
  verify, proof                       ─▶     verify
```

A proof is an HMAC of both challenges, both ranks and the side that speaks, so that it fits one connection and one
direction. The secret itself is never sent. The names of the sockets are derived from it too; they can be read on
the host once they are bound, so whoever connects may be a stranger. Strangers, impostors and second claimants are
hung up on, and the ranks go on waiting for their peers until the deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import time

from sglang_dwdp.errors import DwdpSetupError

_CHALLENGE_BYTES = 32
_CLAIM = struct.Struct(f"!I{_CHALLENGE_BYTES}s")
_ANSWER = struct.Struct(f"!{_CHALLENGE_BYTES}s{hashlib.sha256().digest_size}s")
_PEERCRED = struct.Struct("3i")
_RETRY_S = 0.01


def address(secret: str, rank: int) -> bytes:
    """The abstract name of a rank's socket. It is not a file, so none can be left behind."""
    return f"\0sglang-dwdp.{_mac(secret, f'socket {rank}'.encode()).hex()}".encode()


def _mac(secret: str, message: bytes) -> bytes:
    return hmac.new(secret.encode(), message, hashlib.sha256).digest()


def _proofs(secret: str, listener: int, visitor: int, listeners: bytes, visitors: bytes) -> tuple[bytes, bytes]:
    """The listener's and the visitor's proof for one connection, from both sides' challenges."""
    said = f" {listener} {visitor} ".encode() + listeners + visitors
    return _mac(secret, b"listener" + said), _mac(secret, b"visitor" + said)


def _is_same_user(connection: socket.socket) -> bool:
    _, uid, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return bool(uid == os.getuid())


def receive(connection: socket.socket, nbytes: int) -> bytes:
    """The next `nbytes` bytes of a connection.

    Raises:
        OSError: The other side has left, or the connection's time-out is over.
    """
    data = b""
    while len(data) < nbytes:
        piece = connection.recv(nbytes - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data


class _ImpostorError(OSError):
    """The other side is not the rank that it claims to be, or not one that is awaited."""


def meet(secret: str, rank: int, size: int, timeout_s: float, peers: dict[int, socket.socket]) -> None:
    """Connect with all peers: visit those with a lower rank, wait for those with a higher one.

    Args:
        secret: The same on all ranks of the group, and known to nobody else.
        rank: This process's rank.
        size: Ranks of the group.
        timeout_s: Seconds until a peer that has not come is an error.
        peers: Gets a connection for each peer, as soon as it is met.

    Raises:
        DwdpSetupError: A peer did not come in time. It is named; `peers` has those that did come.
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address(secret, rank))
        except OSError as error:
            raise DwdpSetupError(
                f"rank {rank}: cannot listen for its peers ({error}). Is there a second process of this rank?"
            ) from error
        listener.listen(socket.SOMAXCONN)
        for peer in range(rank):
            peers[peer] = _visit(secret, rank, peer, timeout_s, deadline)
        _receive_peers(secret, rank, size, timeout_s, deadline, listener, peers)
    for connection in peers.values():
        connection.settimeout(timeout_s)


def _visit(secret: str, rank: int, peer: int, timeout_s: float, deadline: float) -> socket.socket:
    met_stranger = False
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(max(deadline - time.monotonic(), _RETRY_S))
            connection.connect(address(secret, peer))
            _introduce(secret, rank, peer, connection)
        except OSError as error:
            connection.close()
            met_stranger |= isinstance(error, _ImpostorError)
        except BaseException:
            connection.close()
            raise
        else:
            return connection
        if time.monotonic() > deadline:
            found = " Another process listens in its place." if met_stranger else ""
            raise DwdpSetupError(
                f"rank {rank}: rank {peer} did not come within {timeout_s:g} s, or had given up.{found}"
            )
        time.sleep(_RETRY_S)


def _introduce(secret: str, rank: int, peer: int, connection: socket.socket) -> None:
    """The visitor's side of the proof."""
    if not _is_same_user(connection):
        raise _ImpostorError
    challenge = secrets.token_bytes(_CHALLENGE_BYTES)
    connection.sendall(_CLAIM.pack(rank, challenge))
    listeners, proof = _ANSWER.unpack(receive(connection, _ANSWER.size))
    expected, own = _proofs(secret, peer, rank, listeners, challenge)
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

    def read(self, secret: str, rank: int, awaited: set[int]) -> bool:
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
        own, self._expected = _proofs(secret, rank, self.rank, challenge, visitors)
        self._received = b""
        self.connection.sendall(_ANSWER.pack(challenge, own))
        return False


def _receive_peers(
    secret: str,
    rank: int,
    size: int,
    timeout_s: float,
    deadline: float,
    listener: socket.socket,
    peers: dict[int, socket.socket],
) -> None:
    awaited = set(range(rank + 1, size))
    visitors: set[socket.socket] = set()  # those that have proven nothing yet
    with contextlib.ExitStack() as leaving, selectors.DefaultSelector() as selector:
        leaving.callback(lambda: list(map(socket.socket.close, visitors)))
        selector.register(listener, selectors.EVENT_READ)
        while awaited:
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if time.monotonic() > deadline:
                raise DwdpSetupError(f"rank {rank}: ranks {sorted(awaited)} did not come within {timeout_s:g} s.")
            for key, _ in ready:
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    if _is_same_user(connection):
                        visitors.add(connection)
                        selector.register(connection, selectors.EVENT_READ, _Visitor(connection))
                    else:
                        connection.close()
                    continue
                visitor: _Visitor = key.data
                try:
                    is_proven = visitor.read(secret, rank, awaited)
                except OSError:
                    selector.unregister(visitor.connection)
                    visitors.remove(visitor.connection)
                    visitor.connection.close()
                    continue
                if is_proven:
                    selector.unregister(visitor.connection)
                    visitors.remove(visitor.connection)
                    awaited.remove(visitor.rank)
                    peers[visitor.rank] = visitor.connection
