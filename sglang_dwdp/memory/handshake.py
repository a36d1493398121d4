"""The control plane of a group: a mesh of Unix sockets that carries short messages and file descriptors.

The ranks meet as `rendezvous` says, and every step has a deadline. A rank that fails says so, or its sockets close:
either way every peer raises within the deadline and can name it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Sequence

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.memory.rendezvous import meet, receive

MAX_FDS = 253  # SCM_MAX_FD: the kernel's limit for one message

_HEADER = struct.Struct("!BIH")  # kind, payload bytes, descriptors
_DATA, _FAILED = range(2)
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
    """One rank's connections with all of its peers."""

    def __init__(self, secret: str, rank: int, size: int, timeout_s: float) -> None:
        """Connect nothing yet.

        Args:
            secret: What only the ranks of this group know, such as a random UUID.
            rank: This process's rank.
            size: Ranks of the group.
            timeout_s: Longest wait in seconds, for all peers to come and for each answer of one.
        """
        self.rank = rank
        self.size = size
        self._secret = secret
        self._timeout_s = timeout_s
        self._peers: dict[int, socket.socket] = {}

    def connect(self) -> None:
        """Meet all peers.

        After a failure in here `fail` reaches the peers that were met already. A rank that comes later finds nobody,
        and gives up after its time-out.

        Raises:
            DwdpSetupError: A peer did not come in time.
        """
        meet(self._secret, self.rank, self.size, self._timeout_s, self._peers)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order.

        Raises:
            DwdpSetupError: A peer failed, ended, or did not answer in time.
        """
        answers = self._swap(payload, ())
        close_fds([fd for _, fds in answers for fd in fds])  # nobody asked for any
        return [answer for answer, _ in answers]

    def all_gather_fds(self, fds: Sequence[int]) -> list[list[int]]:
        """Every peer's descriptors, in rank order; this rank's own entry is empty.

        At most MAX_FDS in a call, so that few are open at a time. The received ones belong to the caller;
        those of a failed call are closed.

        Raises:
            DwdpSetupError: As in `all_gather`.
        """
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} descriptors in one message; the kernel takes {MAX_FDS}")
        return [received for _, received in self._swap(b"", fds)]

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
        except BaseException as error:
            close_fds([fd for _, received in answers for fd in received])
            # Peers that have yet to speak with this rank hear the cause, not of its end.
            self.fail(str(error) or type(error).__name__)
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
                close_fds(self._receive(peer)[1])  # raises what the peer left as its last word, if it left one
            raise self._lost(peer, error) from error

    def _receive(self, peer: int) -> tuple[bytes, list[int]]:
        connection = self._peers[peer]
        fds: list[int] = []
        try:
            header, fds = _receive_with_fds(connection, _HEADER.size)
            header += receive(connection, _HEADER.size - len(header)) if header else b""
            if not header:
                raise ConnectionResetError
            kind, nbytes, nfds = _HEADER.unpack(header)
            payload = receive(connection, nbytes)
            if kind == _FAILED:
                raise DwdpSetupError(f"rank {peer} failed: {payload.decode(errors='replace')}")
            if len(fds) != nfds:
                raise OSError(f"{len(fds)} of {nfds} descriptors arrived (limit on open files: ulimit -n)")
        except BaseException as error:
            close_fds(fds)
            if isinstance(error, OSError):
                raise self._lost(peer, error) from error
            raise
        else:
            return payload, fds

    def _lost(self, peer: int, error: OSError) -> DwdpSetupError:
        if isinstance(error, TimeoutError):
            why = f"no answer within {self._timeout_s:g} s"
        elif isinstance(error, ConnectionError):
            why = "its process ended or gave up"
        else:
            why = str(error)
        return DwdpSetupError(f"rank {self.rank}: lost rank {peer}: {why}.")
