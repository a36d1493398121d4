"""Programs that a benchmark starts: each in a session of its own, with a log, and ended with its children."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
FAILED = "Scheduler hit an exception"  # what SGLang logs before a scheduler ends by itself
_UNTUNED = re.compile(r"Using default MoE kernel config\..*/(E=\d+,N=\d+)")
# Lines of a log that say why a program ended, the most telling first.
_TELLING = ("sglang-dwdp: error:", "AssertionError", "ValueError", "RuntimeError", "OutOfMemoryError", "Error:")


class RunError(RuntimeError):
    """A program did not start, ended, or did not answer in time."""


class Process:
    """A program and its log.

    Args:
        name: For messages.
        command: The program and its arguments.
        environment: All of its variables.
        log: The file that gets its output.
        pass_fds: Descriptors that it inherits.

    Raises:
        RunError: The program does not exist.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log = log
        self.started = time.monotonic()
        self._asked = False
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=pass_fds,
                )
            except OSError as error:
                raise RunError(f"{name} could not be started: {error}") from None

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> None:
        """Return when it has ended, or after a while."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def pids(self) -> set[int]:
        """The program's process and its descendants."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
            return {self._process.pid, *(child.pid for child in children)}
        return set()

    def untuned(self) -> str:
        """That SGLang has no tuned kernels for its experts, so it is not at its best; "" where it has, by the log."""
        experts = sorted(set(_UNTUNED.findall(self.log.read_text(errors="replace"))))
        return f"no tuned Triton configuration for {' and '.join(experts)}" if experts else ""

    def check_alive(self) -> None:
        """Look whether it still runs.

        Raises:
            RunError: It has ended, or one of its schedulers has; the message says why, as far as the log does.
        """
        code = self.exit_code()
        if code is not None:
            raise RunError(f"{self.name} ended with exit code {code}: {reason(self.log)} (log: {self.log})")
        if FAILED in self.log.read_text(errors="replace"):  # SGLang then takes a minute to end
            raise RunError(f"a scheduler of {self.name} failed: {reason(self.log)} (log: {self.log})")

    def ask_to_stop(self) -> None:
        """Send SIGTERM, once: several programs that are to end can do so at the same time."""
        if self.exit_code() is None and not self._asked:
            self._asked = True
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float = 60.0) -> None:
        """Send SIGTERM, after a while SIGKILL; then SIGKILL to what is left of the session. Idempotent.

        Args:
            timeout_s: Seconds between the two; 0 kills at once.
        """
        if timeout_s > 0:
            self.ask_to_stop()
            self.wait(timeout_s)
        self._process.kill()
        self._process.wait()
        for pid in psutil.pids():  # SGLang gives its children process groups of their own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) == self._process.pid:
                    os.kill(pid, signal.SIGKILL)


def reason(log: Path) -> str:
    """The line of a log that best says why its program ended."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it has no log"
    for mark in _TELLING:
        for line in reversed(lines):
            if mark in line:
                return line[:400]
    return lines[-1][:400] if lines else "it printed nothing"


def with_repository(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables with this repository in front of PYTHONPATH, so that `python -m benchmarks…` works anywhere."""
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    return {**environment, "PYTHONPATH": path}
