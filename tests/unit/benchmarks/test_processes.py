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


def test_the_log_says_whose_kernels_are_not_tuned(tmp_path: Path) -> None:
    """As SGLang 0.5.23 logs it, by each rank, for both products of a layer."""
    name = "E=64,N=768,device_name=NVIDIA_H200"
    lines = [f"Using default MoE kernel config. Performance might be sub-optimal! Config file not found at /a/b/{name}"]
    lines = [f"{lines[0]}{down}.json, you can create them with https://a.b" for down in ("", "_down")]
    tuned = (
        "Config file not found at /a/E=8,N=8,d.json. Fallback to triton version 3.6.0 and use MoE kernel config from"
    )
    for said, expected in (([*lines, tuned] * 2, "no tuned Triton configuration for E=64,N=768"), ([tuned], "")):
        process = Process("x", [sys.executable, "-c", "print(" + repr("\n".join(said)) + ")"], {}, tmp_path / "log")
        process.wait(30)
        assert process.untuned() == expected


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
