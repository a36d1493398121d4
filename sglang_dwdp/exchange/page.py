"""The round's state in a page of memory that the ranks of a group share.

A change is made under a lock (`lock.py`), in a copy beside the state in force; then one 8-byte store of a version
number, whose lowest bit says which copy is in force, makes it so. A rank that is killed at any point of this leaves
the state before its change or the one after, and the kernel releases its lock.

The version also tells a waiting rank, for one read of memory, that something has changed. It reads the state itself
under the lock, which orders memory on every architecture.

Each rank holds a second lock, on a byte of its own, for as long as it lives; so others can tell that it died.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang_dwdp.errors import DwdpRuntimeError, DwdpSetupError
from sglang_dwdp.exchange.lock import is_locked, lock, reopen, try_lock, unlock
from sglang_dwdp.exchange.round import Joint, Phase, Round, Seat

if TYPE_CHECKING:
    from sglang_dwdp.memory.handshake import Exchange

MAX_RANKS = 64

_HEADER = struct.Struct("<QII")  # version, ranks, rank that took the lock last
_COPIES = (64, 2112)  # offsets of the two copies: the header has a cache line of its own
_NUMBER = "<Q"  # of the last joint round; then, for each rank:
_SEAT = "IIIIQ"  # phase, bucket, bucket in the last joint round, unused, back_us
_HOLDER_OFFSET = 12
_LOCK = 0  # locks are on bytes that need not exist: the page's, then one for each rank
_LOCK_LIMIT_S = 5.0


def create() -> int:
    """A new page.

    Returns:
        The descriptor of a memory file that has no name, so it goes with the last process that has it.
    """
    fd = os.memfd_create("sglang-dwdp-round", os.MFD_CLOEXEC)
    os.ftruncate(fd, mmap.PAGESIZE)
    return fd


class Page:
    """One rank's access to the page. Not for several threads."""

    def __init__(self, fd: int, rank: int, size: int) -> None:
        """Map the page, and announce that this rank lives.

        Args:
            fd: Descriptor of the page; it stays the caller's.
            rank: Of this process in its group.
            size: Ranks of the group.

        Raises:
            DwdpSetupError: The group is too large, another process has this rank, or the page is another group's.
        """
        if not 0 <= rank < size <= MAX_RANKS:
            raise DwdpSetupError(f"rank {rank} of {size} cannot share a page of rounds: at most {MAX_RANKS} ranks can.")
        self.rank = rank
        self.size = size
        self._seats = struct.Struct(_NUMBER + _SEAT * size)
        self._fd = reopen(fd)
        self._map = mmap.mmap(self._fd, mmap.PAGESIZE)
        self._view = memoryview(self._map)
        self._version = self._view[:8].cast("Q")
        self.seen = -1  # version of the state that `change` returned last
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        if not try_lock(self._fd, 1 + self.rank):
            raise DwdpSetupError(f"rank {self.rank} of this page of rounds is another process already.")
        self._take()
        try:
            _, size, _ = _HEADER.unpack_from(self._map)
            if size == 0:
                self._seats.pack_into(self._map, _COPIES[0], *self._pack(Round.start(self.size)))
                _HEADER.pack_into(self._map, 0, 0, self.size, self.rank)
            elif size != self.size:
                raise DwdpSetupError(f"this page of rounds is for {size} ranks, not {self.size}.")
        finally:
            unlock(self._fd, _LOCK)

    @property
    def version(self) -> int:
        """A number that grows with every change; read without the lock."""
        return self._version[0]

    def change(self, update: Callable[[Round], Round]) -> Round:
        """Replace the state by `update(state)`, as one atomic change.

        Args:
            update: Pure, and quick: it runs under the lock. If it raises, nothing changes.

        Returns:
            The new state.

        Raises:
            DwdpRuntimeError: Another rank has kept the lock for seconds, so it is stopped; named.
        """
        self._take()
        try:
            version = self._version[0]
            old = self._unpack(_COPIES[version & 1])
            new = update(old)
            if new != old:
                self._seats.pack_into(self._map, _COPIES[(version + 1) & 1], *self._pack(new))
                self._version[0] = version + 1
            self.seen = self._version[0]
        finally:
            unlock(self._fd, _LOCK)
        return new

    def lost(self) -> list[int]:
        """The peers that have died, or closed the page, or have not yet opened it."""
        return [r for r in range(self.size) if r != self.rank and not is_locked(self._fd, 1 + r)]

    def leave(self) -> None:
        """Let peers see this rank as lost, though its process goes on; it needs no lock that another may hold."""
        unlock(self._fd, 1 + self.rank)

    def close(self) -> None:
        """Unmap the page: peers see this rank as lost. Idempotent."""
        if self._fd >= 0:
            self._version.release()
            self._view.release()
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def _take(self) -> None:
        if not lock(self._fd, _LOCK, _LOCK_LIMIT_S):
            holder = _HEADER.unpack_from(self._map)[2]
            raise DwdpRuntimeError(
                f"rank {self.rank}: rank {holder} has held the page of rounds for {_LOCK_LIMIT_S:g} s, so its process "
                "is stopped (SIGSTOP, a debugger, or a machine out of memory)."
            )
        struct.pack_into("<I", self._map, _HOLDER_OFFSET, self.rank)

    def _pack(self, state: Round) -> list[int]:
        fields = [state.last.number]
        for seat, joint in zip(state.seats, state.last.buckets, strict=True):
            fields += (seat.phase, seat.bucket, joint, 0, seat.back_us)
        return fields

    def _unpack(self, offset: int) -> Round:
        number, *fields = self._seats.unpack_from(self._map, offset)
        seats = zip(fields[0::5], fields[1::5], fields[4::5], strict=True)
        return Round(
            tuple(Seat(Phase(phase), bucket, back_us) for phase, bucket, back_us in seats),
            Joint(number, tuple(fields[2::5])),
        )


def share_page(handshake: Exchange) -> Page:
    """Make a page and hand it to all ranks, which call this together at set-up.

    Raises:
        DwdpSetupError: A peer failed, ended, or did not answer in time.
    """
    fds = [create()] if handshake.rank == 0 else []
    try:
        received = handshake.all_gather_fds(fds)
        fds = fds or received[0]
        page = Page(fds[0], handshake.rank, handshake.size)
    finally:
        for fd in fds:
            os.close(fd)
    handshake.barrier()  # from here on, a peer that is not seen on the page is lost
    return page
