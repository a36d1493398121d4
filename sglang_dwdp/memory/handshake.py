"""The control plane of a group: a star of sockets around rank 0, for short messages and file descriptors.

What ranks swap goes to rank 0, which hands all of it to each of the others: `2 (n - 1)` messages, where everybody's
messages to everybody are `n (n - 1)`. The ranks meet as `rendezvous` says, and every step has a deadline. A rank that
fails says so, or its sockets close: either way every peer raises within the deadline and can name it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Sequence

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.memory.messages import close_fds, pack, receive_message, send_message, unpack
from sglang_dwdp.memory.places import Place, UnixPlace
from sglang_dwdp.memory.rendezvous import meet

_COUNT = struct.Struct("!I")
_DATA, _FAILED = range(2)

Answer = tuple[bytes, list[int]]  # what a rank sent: payload, descriptors


class _ToldError(DwdpSetupError):
    """A peer said why the group cannot go on."""


class Exchange:
    """One rank's part in the group: rank 0 has a connection with each of the others, and those have one with it.

    Attributes:
        rank: This process's rank.
        size: Ranks of the group.
        sent: Messages that this rank has sent.
    """

    def __init__(self, secret: str, rank: int, size: int, timeout_s: float, place: Place | None = None) -> None:
        """Connect nothing yet.

        Args:
            secret: What only the ranks of this group know, such as a random UUID.
            rank: This process's rank.
            size: Ranks of the group.
            timeout_s: Longest wait in seconds, for all peers to come and for each answer of one.
            place: Where the ranks meet; None: within this host.
        """
        self.rank = rank
        self.size = size
        self.sent = 0
        self._secret = secret
        self._timeout_s = timeout_s
        self._place = place or UnixPlace(secret)
        self._peers: dict[int, socket.socket] = {}

    def connect(self) -> None:
        """Meet the peers.

        After a failure in here `fail` reaches the peers that were met already. A rank that comes later finds nobody,
        and gives up after its time-out.

        Raises:
            DwdpSetupError: A peer did not come in time.
        """
        meet(self._secret, self.rank, self.size, self._timeout_s, self._peers, self._place)

    def swap(self, payload: bytes, fds: Sequence[int] = ()) -> list[Answer]:
        """Give all ranks a payload and descriptors, and take theirs.

        Args:
            payload: For all.
            fds: For all others; they stay the caller's. Only within a host.

        Returns:
            Every rank's, in rank order. Received descriptors belong to the caller; this rank's own entry has none.

        Raises:
            DwdpSetupError: A peer failed, ended, or did not answer in time; received descriptors are closed.
        """
        answers: list[Answer] = []
        try:
            if self.rank:
                answers += self._swap_with_first(payload, fds)
            else:
                self._swap_with_all(payload, fds, answers)
        except BaseException as error:
            close_fds([fd for _, received in answers for fd in received])
            reason = str(error) or type(error).__name__
            self._tell(reason if isinstance(error, _ToldError) else self._failed(reason))
            raise
        return answers

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order.

        Raises:
            DwdpSetupError: As `swap`.
        """
        answers = self.swap(payload)
        close_fds([fd for _, fds in answers for fd in fds])  # nobody asked for any
        return [answer for answer, _ in answers]

    def all_gather_fds(self, fds: Sequence[int]) -> list[list[int]]:
        """Every peer's descriptors, in rank order; this rank's own entry is empty.

        The received ones belong to the caller; those of a failed call are closed.

        Raises:
            DwdpSetupError: As `swap`.
        """
        return [received for _, received in self.swap(b"", fds)]

    def barrier(self) -> None:
        """Return when all ranks have called this."""
        self.all_gather(b"")

    def check_failed(self) -> None:
        """Look whether a peer has said that it failed. Does not wait.

        A rank says so before it gives its memory back, so what it said explains why that cannot be imported.

        Raises:
            DwdpSetupError: One has.
        """
        texts = self._last_words()
        if texts:
            raise _ToldError("; ".join(texts))

    def _last_words(self) -> list[str]:
        texts = []
        for peer, connection in self._peers.items():
            with contextlib.suppress(OSError):
                connection.settimeout(0.001)
                if connection.recv(1, socket.MSG_PEEK) == bytes([_FAILED]):
                    try:
                        close_fds(self._receive(peer, self._timeout_s)[1])
                    except _ToldError as error:
                        texts.append(str(error))
        return texts

    def fail(self, reason: str) -> None:
        """Tell the peers that this rank cannot go on. They raise at their next step. Never raises."""
        self._tell(self._failed(reason))

    def take_connections(self) -> dict[int, socket.socket]:
        """The connections by rank, which are the caller's from now on."""
        connections, self._peers = self._peers, {}
        return connections

    def close(self) -> None:
        """Close all connections. Idempotent."""
        for connection in self._peers.values():
            connection.close()
        self._peers.clear()

    def _failed(self, reason: str) -> str:
        return f"rank {self.rank} failed: {reason}"

    def _tell(self, what: str) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError, DwdpSetupError):
                self._send(peer, _FAILED, what.encode())

    def _swap_with_all(self, payload: bytes, fds: Sequence[int], answers: list[Answer]) -> None:
        deadline = time.monotonic() + self._timeout_s
        answers.append((payload, []))
        for peer in sorted(self._peers):
            self._peers[peer].settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                answers.append(self._receive(peer, self._timeout_s))
            except _ToldError as error:  # another's failure may be the cause
                raise _ToldError("; ".join([str(error), *self._last_words()])) from error
        counts = [len(fds), *(len(of_rank) for _, of_rank in answers[1:])]
        bundle = pack([part for (own, _), n in zip(answers, counts, strict=True) for part in (own, _COUNT.pack(n))])
        for peer in sorted(self._peers):
            others = [fd for rank, (_, of_rank) in enumerate(answers) if rank != peer for fd in of_rank]
            self._peers[peer].settimeout(self._timeout_s)
            self._send(peer, _DATA, bundle, [*fds, *others])

    def _swap_with_first(self, payload: bytes, fds: Sequence[int]) -> list[Answer]:
        # Rank 0 may come as late as the deadline allows, and then wait as long for another rank: it can name that one.
        wait_s = 2 * self._timeout_s + 1
        self._peers[0].settimeout(wait_s)
        self._send(0, _DATA, payload, fds)
        bundle, received = self._receive(0, wait_s)
        try:
            parts = unpack(bundle)
            counts = [_COUNT.unpack(count)[0] for count in parts[1::2]]
            if len(counts) != self.size or sum(counts) - len(fds) != len(received):
                raise DwdpSetupError(f"rank 0 sent something else than what {self.size} ranks swapped")
            counts[self.rank] = 0  # it does not get its own back
        except BaseException:
            close_fds(received)
            raise
        left = iter(received)
        return [(part, [next(left) for _ in range(count)]) for part, count in zip(parts[::2], counts, strict=True)]

    def _send(self, peer: int, kind: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        self.sent += 1
        try:
            send_message(self._peers[peer], kind, payload, fds)
        except OSError as error:
            if kind == _DATA:
                close_fds(self._receive(peer, self._timeout_s)[1])  # raises what the peer left as its last word
            raise self._lost(peer, error, self._timeout_s) from error

    def _receive(self, peer: int, wait_s: float) -> Answer:
        try:
            kind, payload, fds = receive_message(self._peers[peer])
        except OSError as error:
            raise self._lost(peer, error, wait_s) from error
        if kind == _FAILED:
            close_fds(fds)
            raise _ToldError(payload.decode(errors="replace"))
        return payload, fds

    def _lost(self, peer: int, error: OSError, wait_s: float) -> DwdpSetupError:
        if isinstance(error, TimeoutError):
            why = f"no answer within {wait_s:g} s"
        elif isinstance(error, ConnectionError):
            why = "its process ended or gave up"
        else:
            why = str(error)
        return DwdpSetupError(f"rank {self.rank}: lost rank {peer}: {why}.")
