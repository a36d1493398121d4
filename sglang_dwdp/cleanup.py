"""Removes the shared-memory files that a server's processes leave when SGLang ends them.

DWDP's own memory has no names, so nothing of it can be left. SGLang has files in /dev/shm, and ends its processes
with SIGKILL, which lets none of them tidy up. A small process outside the server's tree notes which such files the
server's processes map, waits for the launcher to end, in whatever way, and removes those that no process maps any
more. Reading what processes map takes their memory-map locks, so it looks only after names in /dev/shm have changed.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

SHM = Path("/dev/shm")
# SGLang's message queues and load snapshots, and multiprocessing's semaphores. All of them stay mapped in some
# process for as long as they are of use.
PATTERNS = ("sgl_shm_mq_*", "sglang_loads_*.shm", "sem.mp-*")
_DEADLINE_S = 30.0
_POLL_S = 1.0
_LOOKS = 3  # after a change: a file may be named a moment before it is mapped
_pipes: list[IO[bytes] | None] = []  # open until this process ends


def watch() -> None:
    """Start the cleaning process for this launcher; it ends by itself soon after the launcher.

    One is enough for all servers that the launcher starts: it follows all descendants.
    """
    if _pipes:
        return
    # The pipe's write end stays open in this process for as long as it lives (children started with spawn do not
    # inherit it). The cleaner detaches itself, so that it is not killed with the server's process tree.
    process = subprocess.Popen(
        [sys.executable, "-S", __file__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    _pipes.append(process.stdin)
    process.wait()


def named(directory: Path = SHM) -> set[Path]:
    """The files of `PATTERNS` in `directory`."""
    return {path for pattern in PATTERNS for path in directory.glob(pattern)}


def mapped(pids: Iterable[int], directory: Path = SHM) -> set[Path]:
    """The files of `PATTERNS` in `directory` that any of these processes maps."""
    # By inode: a semaphore is mapped under a temporary name, and linked to its own one afterwards.
    inodes: dict[tuple[int, int], Path] = {}
    for path in named(directory):
        with contextlib.suppress(OSError):
            status = path.stat()
            inodes[status.st_dev, status.st_ino] = path
    found: set[Path] = set()
    for pid in pids if inodes else ():
        with contextlib.suppress(OSError):  # it ended, or is another user's
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                _, _, _, device, inode, *_ = line.split()
                major, minor = (int(part, 16) for part in device.split(":"))
                file = inodes.get((os.makedev(major, minor), int(inode)))
                if file is not None:
                    found.add(file)
    return found


class Watcher:
    """The files that a launcher's processes map, or have mapped.

    Args:
        launcher: its process id.
        directory: where the files are.
    """

    def __init__(self, launcher: int, directory: Path = SHM) -> None:
        self.files: set[Path] = set()
        self._launcher, self._directory = launcher, directory
        self._names: set[Path] = set()
        self._looks_left = 0

    def look(self) -> None:
        """Add what is mapped now; nothing but a listing of `directory` unless its names have changed lately."""
        names = named(self._directory)
        if names != self._names:
            self._names, self._looks_left = names, _LOOKS
        if self._looks_left:
            self._looks_left -= 1
            self.files |= mapped(descendants(self._launcher), self._directory)


def descendants(root: int) -> set[int]:
    """`root` and all processes that it started, directly or not."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(pid)
    found = [root]
    for pid in found:  # which grows meanwhile
        found += children.get(pid, [])
    return set(found)


def all_pids() -> list[int]:
    """Every process of the machine."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def clean(files: set[Path]) -> None:
    """Remove `files` as processes stop mapping them, for a while."""
    deadline = time.monotonic() + _DEADLINE_S
    while files and time.monotonic() < deadline:
        for path in files - mapped(all_pids()):
            path.unlink(missing_ok=True)
            files.discard(path)
        time.sleep(_POLL_S / 2)


def main() -> None:
    """Detach, watch until the launcher's end of the pipe closes, and clean."""
    launcher = int(sys.argv[1])
    if os.fork():
        os._exit(0)
    watcher = Watcher(launcher)
    while True:
        watcher.look()
        if select.select([sys.stdin], [], [], _POLL_S)[0]:
            break
    clean(watcher.files)


if __name__ == "__main__":
    main()
