"""Processes of benchmarks: why they ended, and that nothing of them is left."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import Process, RunError, reason


def python(code: str, log: Path) -> Process:
    return Process("it", [sys.executable, "-c", code], dict(os.environ), log)


def test_the_log_says_why(tmp_path: Path) -> None:
    process = python("print('first'); raise ValueError('wrong size')", tmp_path / "log")
    while process.exit_code() is None:
        time.sleep(0.02)
    with pytest.raises(RunError, match="it ended with exit code 1: ValueError: wrong size"):
        process.check_alive()
    process.stop()
    assert reason(tmp_path / "none") == "it has no log"


def test_children_with_groups_of_their_own_end_too(tmp_path: Path) -> None:
    code = (
        "import subprocess as s, time; print(s.Popen(['sleep', '60'], process_group=0).pid, flush=True); time.sleep(60)"
    )
    process = python(code, tmp_path / "log")
    while not (text := (tmp_path / "log").read_text()):
        time.sleep(0.02)
    assert int(text) in process.pids()
    process.stop(0)
    process.stop(0)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(text)) and psutil.Process(int(text)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_such_program(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it could not be started"):
        Process("it", ["/nonexistent"], {}, tmp_path / "log")
