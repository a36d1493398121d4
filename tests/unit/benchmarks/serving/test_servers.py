"""Processes: one clear error for each way in which a server fails, and nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.serving.errors import RunError
from benchmarks.serving.servers import Process, reason, wait_healthy
from sglang_dwdp.demo.server import free_port

HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def start(tmp_path: Path, program: str, *arguments: str) -> Process:
    return Process("it", [sys.executable, "-c", program, *arguments], dict(os.environ), tmp_path / "log")


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_a_server_is_stopped_with_its_children(tmp_path: Path) -> None:
    port = free_port()
    process = start(tmp_path, HEALTHY, str(port))
    seen: list[str] = []
    wait_healthy(process, f"http://127.0.0.1:{port}", 30, seen.append)
    child = int((tmp_path / "log").read_text().split()[1])
    assert seen
    assert alive(child)
    process.stop()
    process.stop()
    assert process.exit_code() is not None
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_several_end_together(tmp_path: Path) -> None:
    program = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(7)))\n"
    program += "print('on', flush=True); time.sleep(600)"
    several = [Process(str(n), [sys.executable, "-c", program], {}, tmp_path / f"log{n}") for n in range(3)]
    while not all("on" in process.log.read_text() for process in several):
        time.sleep(0.05)
    begin = time.monotonic()
    for process in several:
        process.ask_to_stop()
    for process in several:
        process.stop()
    assert [process.exit_code() for process in several] == [7, 7, 7]
    assert time.monotonic() - begin < 2.5


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = start(
        tmp_path, "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on'); time.sleep(600)"
    )
    time.sleep(0.5)
    process.stop(0.2)
    assert process.exit_code() == -signal.SIGKILL


def test_one_that_loses_a_worker(tmp_path: Path) -> None:
    program = """
import subprocess, sys, time
worker = subprocess.Popen(["sglang::scheduler_DP1", "-c", "import time; time.sleep(600)"], executable=sys.executable)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", worker.pid, other.pid, flush=True)
time.sleep(600)
"""
    process = start(tmp_path, program)
    try:
        while not (words := (tmp_path / "log").read_text().split()):
            time.sleep(0.05)
        time.sleep(0.3)
        process.watch_workers()
        process.check_alive()
        os.kill(int(words[2]), signal.SIGKILL)  # no process of SGLang's: compilers, for one, come and go
        time.sleep(0.2)
        process.check_alive()
        os.kill(int(words[1]), signal.SIGKILL)  # a zombie, whose parent does not care
        time.sleep(0.2)
        with pytest.raises(
            RunError, match=rf"it lost sglang::scheduler_DP1, process {words[1]}: killed, or ended in silence .*log"
        ):
            process.check_alive()
    finally:
        process.stop(1)


def test_one_that_ends_at_once(tmp_path: Path) -> None:
    program = "import sys; print('Loading'); sys.stderr.write('ValueError: 8 experts\\nbye\\n'); sys.exit(3)"
    process = start(tmp_path, program)
    with pytest.raises(RunError, match=r"it ended with exit code 3: ValueError: 8 experts \(log: .*log\)"):
        wait_healthy(process, "http://127.0.0.1:9", 30, lambda _text: None)
    process.stop()


def test_one_that_never_answers(tmp_path: Path) -> None:
    process = start(tmp_path, "import time; print('thinking', flush=True); time.sleep(600)")
    with pytest.raises(RunError, match=r"did not answer within 1 s \(start_timeout_s\): thinking"):
        wait_healthy(process, "http://127.0.0.1:9", 1, lambda _text: None)
    process.stop(1)


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"it could not be started: .*No such file"):
        Process("it", ["/no/such/program"], {}, tmp_path / "log")


def test_what_a_log_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("")
    assert reason(log) == "it printed nothing"
    log.write_text("RuntimeError: a\nsglang-dwdp: error: b\nAssertionError: c\nthe end\n")
    assert reason(log) == "sglang-dwdp: error: b"
    log.write_text("one\ntwo\n\n")
    assert reason(log) == "two"
