"""SGLang's serving benchmark in a process for each run, forked from one that has imported it.

Importing it takes half a minute on a busy host, longer than many runs.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_MODULE = "sglang.benchmark.serving"
_context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Begin to import the benchmark; returns at once."""
    _context.set_forkserver_preload(["__main__", _MODULE])
    multiprocessing.forkserver.ensure_running()


class Client:
    """One run of the benchmark.

    Attributes:
        log: Gets its output.
        started: Of the monotonic clock.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        """Start `python -m sglang.benchmark.serving` with these arguments."""
        self.log, self.started = log, time.monotonic()
        self._process = _context.Process(target=_run, args=(list(arguments), str(log)), daemon=True)
        self._process.start()

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def stop(self) -> None:
        """End it at once. Idempotent."""
        self._process.kill()
        self._process.join()


def _run(arguments: list[str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    from sglang.benchmark.serving import cli_main

    sys.argv = [_MODULE, *arguments]
    cli_main()
