"""Server processes: started, watched until they answer, and stopped with everything they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import requests

from benchmarks.serving.errors import RunError

_POLL_S = 0.5
FAILED = "Scheduler hit an exception"  # what SGLang logs before a scheduler ends by itself
_WORKER = "sglang::"  # how SGLang names its schedulers, controllers and detokenizers
# Lines of a log that say why a server ended, the most telling first.
_TELLING = ("sglang-dwdp: error:", "AssertionError", "ValueError", "RuntimeError", "OutOfMemoryError", "Error:")


class Process:
    """A program in a process group of its own, with its output in a log file.

    Raises:
        RunError: the program does not exist.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.started = time.monotonic()
        self._asked = False
        self._workers: dict[psutil.Process, str] = {}
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            except OSError as error:
                raise RunError(f"{name} could not be started: {error}") from None

    @property
    def pid(self) -> int:
        """Of the program, and of its process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def watch_workers(self) -> None:
        """From now on `check_alive` also looks at the processes of SGLang that the program has started.

        SGLang itself does not notice when one is killed, and leaves its requests unanswered.
        """
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, IndexError):
                    title = child.cmdline()[0]
                    if title.startswith(_WORKER):
                        self._workers[child] = title

    def lost(self) -> str | None:
        """The title of a watched process that is gone."""
        for worker, title in self._workers.items():
            try:
                if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
                    continue
            except psutil.NoSuchProcess:
                pass
            return f"{title}, process {worker.pid}"
        return None

    def check_alive(self) -> None:
        """
        Raises:
            RunError: the program, or a process of it that is watched, has ended; the message says why, as far as its
                log does.
        """
        code = self.exit_code()
        if code is not None:
            raise RunError(f"{self.name} ended with exit code {code}: {reason(self.log)} (log: {self.log})")
        gone = self.lost()
        if gone:
            why = reason(self.log) if FAILED in self.log.read_text(errors="replace") else "killed, or ended in silence"
            raise RunError(f"{self.name} lost {gone}: {why} (log: {self.log})")

    def ask_to_stop(self) -> None:
        """SIGTERM, once: where several are to end, they do so together."""
        if self.exit_code() is None and not self._asked:
            self._asked = True
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float = 60.0) -> None:
        """SIGTERM, and after `timeout_s` seconds SIGKILL, to the program; then whatever is left of its group.

        Idempotent.
        """
        self.ask_to_stop()
        if self.exit_code() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def wait_healthy(process: Process, url: str, timeout_s: float, progress: Callable[[str], None]) -> None:
    """Return when `url` answers GET /health.

    timeout_s: since the process was started.

    Raises:
        RunError: the process ended, or did not answer in time.
    """
    while True:
        process.check_alive()
        seconds = time.monotonic() - process.started
        progress(f"{process.name}: starting, {seconds:.0f} s")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        if seconds > timeout_s:
            raise RunError(
                f"{process.name} did not answer within {timeout_s:g} s (start_timeout_s): {reason(process.log)} "
                f"(log: {process.log})"
            )
        time.sleep(_POLL_S)


def reason(log: Path) -> str:
    """The line of a log that best says why its program ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for mark in _TELLING:
        for line in reversed(lines):
            if mark in line:
                return line[:400]
    return lines[-1][:400] if lines else "it printed nothing"
