"""Ports for servers that run beside each other, also those of another comparison on this host."""

from __future__ import annotations

import contextlib
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks.serving.errors import RunError, ScenarioError

# SGLang derives more ports from --port: with attention data parallelism 13 above, and a dozen from 233 on. It draws
# ports of its own from 22000 on, and the system hands them out from 32768 on, so all of ours lie below.
_SPAN = 300
_FIRST, _LAST = 12000, 21600
_DERIVED = (0, 13, *range(233, 247))


@contextlib.contextmanager
def reserved_port(folder: Path | None = None) -> Iterator[int]:
    """A port that is free with those that SGLang derives from it, and that nobody else is given until the end.

    folder: of the lock files (default: one in the temporary folder, shared by all comparisons on this host).

    Raises:
        RunError: all are taken.
    """
    folder = folder or Path(tempfile.gettempdir()) / "sglang-dwdp-ports"
    folder.mkdir(parents=True, exist_ok=True)
    bases = list(range(_FIRST, _LAST, _SPAN))
    random.shuffle(bases)
    for base in bases:
        lock = FileLock(folder / f"{base}.lock", mode=0o666)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            if not any(_taken(base + offset) for offset in _DERIVED):
                yield base
                return
        finally:
            lock.release()
    raise RunError(f"no free ports between {_FIRST} and {_LAST}: stop servers that are no longer needed")


def check_free(port: int) -> None:
    """
    Raises:
        ScenarioError: something listens on `port` already.
    """
    error = _taken(port)
    if error:
        raise ScenarioError(
            f"port {port} is busy ({error}): stop what listens there, set another port, or leave port out to have a "
            "free one chosen"
        )


def _taken(port: int) -> str | None:
    """Why nothing can listen on a port, None if something can."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            return str(error.strerror)
    return None
