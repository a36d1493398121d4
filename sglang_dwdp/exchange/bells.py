"""Event descriptors by which a rank that waits wakes idle peers that sleep."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_dwdp.memory.handshake import Exchange


def create() -> int:
    """A new bell: an eventfd that blocks nobody."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Bells:
    """The bells of a group; this rank listens to its own."""

    def __init__(self, fds: Sequence[int], rank: int) -> None:
        """Take the bells over.

        Args:
            fds: One for each rank, in rank order; closed by `close`.
            rank: Of this process in its group.
        """
        self._fds, self._rank = list(fds), rank

    def fileno(self) -> int:
        """The descriptor that is readable once a peer has rung."""
        return self._fds[self._rank]

    def ring(self, peers: Iterable[int]) -> None:
        """Wake these peers if they sleep; those that do not will sleep less once."""
        for peer in peers:
            with contextlib.suppress(BlockingIOError):  # it has rung 2**64 times already
                os.eventfd_write(self._fds[peer], 1)

    def silence(self) -> None:
        """Forget that this rank's bell has rung."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fds[self._rank])

    def close(self) -> None:
        """Close all of them. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())


def share_bells(handshake: Exchange) -> Bells:
    """Make this rank's bell and exchange it for the peers'; all ranks call this together at set-up.

    Raises:
        DwdpSetupError: A peer failed, ended, or did not answer in time.
    """
    own = create()
    try:
        received = handshake.all_gather_fds([own])
    except BaseException:
        os.close(own)
        raise
    fds = [own if rank == handshake.rank else peers[0] for rank, peers in enumerate(received)]
    return Bells(fds, handshake.rank)
