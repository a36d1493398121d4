"""A lock in a file that several processes share, and that the kernel releases when its holder dies.

Open-file-description locks (`F_OFD_SETLK` of fcntl(2)), not the older record locks: those belong to a process, so
that threads do not exclude one another, and all of them are dropped when the process closes any descriptor of the
file. One of these belongs to the description that it was taken through. A descriptor that arrives over a socket, or
from `dup`, shares its description with the sender; hence `reopen`.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, process
_SPINS = 50
_NAP_S = 20e-6


def reopen(fd: int) -> int:
    """A description of our own of the file behind `fd`; it outlives `fd`, and is not inherited by child processes."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def try_lock(fd: int, offset: int) -> bool:
    """Take the lock of the byte at `offset`, unless another description holds it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    except BlockingIOError:
        return False
    return True


def lock(fd: int, offset: int, limit_s: float) -> bool:
    """Take the lock of the byte at `offset`, or give up after `limit_s` seconds.

    Not `F_OFD_SETLKW`, which has no limit: a holder that is stopped (SIGSTOP, a debugger) would stop everybody.

    Returns:
        Whether the lock was taken.
    """
    for _ in range(_SPINS):
        if try_lock(fd, offset):
            return True
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        time.sleep(_NAP_S)
        if try_lock(fd, offset):
            return True
    return False


def unlock(fd: int, offset: int) -> None:
    """Release the lock of the byte at `offset`."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))


def is_locked(fd: int, offset: int) -> bool:
    """Whether another description holds the lock of the byte at `offset`."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
