"""Removes the shared-memory files that a server's processes leave when SGLang ends them.

DWDP's own memory has no names, so nothing of it can be left. SGLang has two kinds of files in /dev/shm, and ends
its processes with SIGKILL, which lets none of them tidy up. A small process outside the server's tree waits for
the launcher to end, in whatever way, and removes the files that no process maps any more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

SHM = Path("/dev/shm")
PATTERNS = ("sgl_shm_mq_*", "sglang_loads_*.shm")  # SGLang's message queues, and its load snapshots
_DEADLINE_S = 30.0
_SETTLE_S = 1.0
_pipes: list[IO[bytes] | None] = []  # open until this process ends


def watch() -> None:
    """Start the cleaning process for this launcher; it ends by itself soon after the launcher."""
    # The pipe's write end stays open in this process for as long as it lives (children started with spawn do not
    # inherit it). The cleaner detaches itself, so that it is not killed with the server's process tree.
    process = subprocess.Popen(
        [sys.executable, "-S", __file__, str(time.time())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    _pipes.append(process.stdin)
    process.wait()


def leftovers(since: float, directory: Path = SHM) -> set[Path]:
    """SGLang's files of this user that appeared after `since` (seconds since the epoch) and that no process maps."""
    found = set()
    for path in (path for pattern in PATTERNS for path in directory.glob(pattern)):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid == os.getuid() and status.st_ctime >= since:
            found.add(path)
    if found:
        found -= _mapped(found)
    return found


def _mapped(paths: Iterable[Path]) -> set[Path]:
    left = {str(path): path for path in paths}
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:  # it ended, or is another user's
            continue
        mapped |= {path for name, path in left.items() if name in text}
    return mapped


def clean(since: float) -> None:
    """Remove what is left over twice in a row: a file may just have been made, and not be mapped yet."""
    deadline = time.monotonic() + _DEADLINE_S
    before: set[Path] = set()
    quiet = 0
    while quiet < 5 and time.monotonic() < deadline:
        now = leftovers(since)
        for path in now & before:
            path.unlink(missing_ok=True)
        quiet = 0 if now else quiet + 1
        before = now
        time.sleep(_SETTLE_S)


def main() -> None:
    """Detach, wait for the launcher's end of the pipe to close, clean."""
    if os.fork():
        os._exit(0)
    sys.stdin.buffer.read()
    clean(float(sys.argv[1]))


if __name__ == "__main__":
    main()
