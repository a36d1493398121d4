"""The lock of the file in which schedulers publish their load, with a bounded wait.

It is one lock for all ranks. A rank that is stopped while it holds it would stop the others at their next publication,
and the controller at its next request. What it protects is a number to balance load by, which SGLang's reader discards
where it cannot be decoded.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.hooks import Hook

_LIMIT_S = 0.01
_NAP_S = 0.0005


@contextmanager
def bounded_lock(fd: int, kind: int) -> Iterator[None]:
    """In place of `load_snapshot.file_lock`: the lock, or after a hundredth of a second none.

    Args:
        fd: Of the file.
        kind: `fcntl.LOCK_SH` or `fcntl.LOCK_EX`.
    """
    deadline = time.monotonic() + _LIMIT_S
    while not (is_held := _try(fd, kind)) and time.monotonic() < deadline:
        time.sleep(_NAP_S)
    try:
        yield
    finally:
        if is_held:
            fcntl.flock(fd, fcntl.LOCK_UN)


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


HOOKS = (Hook("sglang.srt.managers.load_snapshot.file_lock", HookType.REPLACE, bounded_lock),)
