"""A lock that somebody keeps is waited for a little, and then gone without."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from sglang_dwdp.srt_patches.load_lock import bounded_lock


def test_the_lock_is_held_inside_and_free_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    first, second = (os.open(path, os.O_RDWR) for _ in range(2))
    try:
        with bounded_lock(first, fcntl.LOCK_EX):
            start = time.monotonic()
            with bounded_lock(second, fcntl.LOCK_SH):  # the first one keeps it
                assert 0.01 <= time.monotonic() - start < 5
        with bounded_lock(first, fcntl.LOCK_SH), bounded_lock(second, fcntl.LOCK_SH):
            pass
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(first)
        os.close(second)
