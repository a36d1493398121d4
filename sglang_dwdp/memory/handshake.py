"""The control plane of a group: a mesh of Unix sockets that carries short messages and file descriptors.

Sockets have abstract names (they are not files, so none can be left behind), accept the same user only, and
have a deadline on every step. A rank that fails says so, or its sockets close: either way every peer raises
within the deadline and can name it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence

from sglang_dwdp.errors import DwdpSetupError

MAX_FDS = 253  # SCM_MAX_FD: the kernel's limit for one message

_HEADER = struct.Struct("!BIH")  # kind, payload bytes, descriptors
_HELLO, _DATA, _FAILED = range(3)
_UNNAMED = -1
_PEERCRED = struct.Struct("3i")
_CMSG_CLOEXEC = 0x40000000  # MSG_CMSG_CLOEXEC: a received descriptor is not inherited by child processes


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that nothing took over."""
    for fd in fds:
        os.close(fd)


def _receive_with_fds(connection: socket.socket, nbytes: int) -> tuple[bytes, list[int]]:
    # Not socket.recv_fds: it leaves the flags out in some releases of Python.
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(nbytes, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), _CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, fds.tolist()


class Exchange:
    """Rank `rank` of `size`, meeting its peers under `name` (the same on all ranks, unique on the host)."""

    def __init__(self, name: str, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._name = name
        self._timeout_s = timeout_s
        self._peers: dict[int, socket.socket] = {}

    def connect(self) -> None:
        """Meet all peers: accept those with a higher rank, connect to those with a lower one.

        A failure in here is heard by the peers that were met already. A rank that comes later finds nobody, and gives
        up after its time-out.

        Raises:
            DwdpSetupError: a peer did not come in time, or another user came.
        """
        deadline = time.monotonic() + self._timeout_s
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address(self.rank))
            listener.listen(self.size)
            for peer in range(self.rank):
                self._add(peer, self._connect_to(peer, deadline))
                self._send(peer, _HELLO, str(self.rank).encode())
            for _ in range(self.rank + 1, self.size):
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    missing = [r for r in range(self.rank + 1, self.size) if r not in self._peers]
                    raise DwdpSetupError(
                        f"rank {self.rank}: ranks {missing} did not come within {self._timeout_s:g} s."
                    ) from None
                self._greet(connection)

    def _address(self, rank: int) -> bytes:
        return f"\0sglang-dwdp.{self._name}.{rank}".encode()

    def _connect_to(self, peer: int, deadline: float) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self._address(peer))
            except ConnectionRefusedError:  # it does not listen yet
                connection.close()
                if time.monotonic() > deadline:
                    raise DwdpSetupError(
                        f"rank {self.rank}: rank {peer} did not come within {self._timeout_s:g} s, or had given up."
                    ) from None
                time.sleep(0.01)
            else:
                return connection

    def _greet(self, connection: socket.socket) -> None:
        self._add(_UNNAMED, connection)
        payload, _ = self._receive(_UNNAMED)
        self._peers[int(payload)] = self._peers.pop(_UNNAMED)

    def _add(self, peer: int, connection: socket.socket) -> None:
        # Names are visible to every user of the host, so whoever listens or comes may be a stranger.
        _, uid, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        if uid != os.getuid():
            connection.close()
            raise DwdpSetupError(f"rank {self.rank}: a process of user {uid} came in a peer's place.")
        connection.settimeout(self._timeout_s)
        self._peers[peer] = connection

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order.

        Raises:
            DwdpSetupError: a peer failed, ended, or did not answer in time.
        """
        return [answer for answer, _ in self._swap(payload, ())]

    def all_gather_fds(self, fds: Sequence[int]) -> list[list[int]]:
        """Every peer's descriptors, in rank order; this rank's own entry is empty.

        At most MAX_FDS in a call, so that few are open at a time. The received ones belong to the caller;
        those of a failed call are closed.

        Raises:
            DwdpSetupError: as `all_gather`.
        """
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} descriptors in one message; the kernel takes {MAX_FDS}")
        return [theirs for _, theirs in self._swap(b"", fds)]

    def barrier(self) -> None:
        """Return when all ranks have called this."""
        self.all_gather(b"")

    def fail(self, reason: str) -> None:
        """Tell the peers that this rank cannot go on. They raise at their next step. Never raises."""
        for peer in self._peers:
            with contextlib.suppress(OSError, DwdpSetupError):
                self._send(peer, _FAILED, reason.encode())

    def close(self) -> None:
        """Close all connections. Idempotent."""
        for connection in self._peers.values():
            connection.close()
        self._peers.clear()

    def _swap(self, payload: bytes, fds: Sequence[int]) -> list[tuple[bytes, list[int]]]:
        # Pairs meet in one order on all ranks, and in each pair the lower rank speaks first, so that no two
        # ranks can wait for each other with full socket buffers.
        answers: list[tuple[bytes, list[int]]] = [(payload, [])] * self.size
        try:
            for peer in sorted(self._peers):
                if self.rank < peer:
                    self._send(peer, _DATA, payload, fds)
                    answers[peer] = self._receive(peer)
                else:
                    answers[peer] = self._receive(peer)
                    self._send(peer, _DATA, payload, fds)
        except DwdpSetupError as error:
            close_fds([fd for _, theirs in answers for fd in theirs])
            self.fail(str(error))  # peers that have yet to speak with this rank hear the cause, not of its end
            raise
        return answers

    def _send(self, peer: int, kind: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        connection = self._peers[peer]
        message = _HEADER.pack(kind, len(payload), len(fds)) + payload
        try:
            if fds:
                message = message[socket.send_fds(connection, [message], fds) :]
            if message:  # a peer may have read all of it and closed, which makes even an empty send an error
                connection.sendall(message)
        except OSError as error:
            if kind == _DATA:
                self._receive(peer)  # raises what the peer left as its last word, if it left one
            raise self._lost(peer, error) from error

    def _receive(self, peer: int) -> tuple[bytes, list[int]]:
        connection = self._peers[peer]
        fds: list[int] = []
        try:
            header, fds = _receive_with_fds(connection, _HEADER.size)
            header += self._read(connection, _HEADER.size - len(header)) if header else b""
            if not header:
                raise ConnectionResetError
            kind, nbytes, nfds = _HEADER.unpack(header)
            payload = self._read(connection, nbytes)
            if kind == _FAILED:
                raise DwdpSetupError(f"{_called(peer)} failed: {payload.decode(errors='replace')}")
            if len(fds) != nfds:
                raise OSError(f"{len(fds)} of {nfds} descriptors arrived (limit on open files: ulimit -n)")
        except OSError as error:
            close_fds(fds)
            raise self._lost(peer, error) from error
        else:
            return payload, fds

    @staticmethod
    def _read(connection: socket.socket, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            piece = connection.recv(nbytes - len(data))
            if not piece:
                raise ConnectionResetError
            data += piece
        return data

    def _lost(self, peer: int, error: OSError) -> DwdpSetupError:
        if isinstance(error, TimeoutError):
            why = f"no answer within {self._timeout_s:g} s"
        elif isinstance(error, ConnectionError):
            why = "its process ended or gave up"
        else:
            why = str(error)
        return DwdpSetupError(f"rank {self.rank}: lost {_called(peer)}: {why}.")


def _called(peer: int) -> str:
    return "a peer that had not said its rank" if peer == _UNNAMED else f"rank {peer}"
