"""Ports: those that SGLang derives are free too, and nobody is given them twice."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import ports
from benchmarks.serving.errors import RunError, ScenarioError
from benchmarks.serving.ports import check_free, reserved_port


def listening(port: int) -> socket.socket:
    busy = socket.socket()
    busy.bind(("127.0.0.1", port))
    busy.listen()
    return busy


def test_a_busy_port_is_named() -> None:
    with listening(0) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ScenarioError, match=f"port {port} is busy .*: stop what listens there"):
            check_free(port)
    check_free(port)


def test_nobody_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_LAST", ports._FIRST + 3 * ports._SPAN)  # three places
    monkeypatch.setattr(ports, "_taken", lambda _port: None)
    other = (
        "from pathlib import Path; from benchmarks.serving import ports\n"
        "ports._LAST, ports._taken = ports._FIRST + 3 * ports._SPAN, lambda _port: None\n"
        f"with ports.reserved_port(Path({str(tmp_path)!r})) as port: print(port, flush=True); input()"
    )
    with contextlib.ExitStack() as stack:
        mine = [stack.enter_context(reserved_port(tmp_path)) for _ in range(2)]
        process = subprocess.Popen(
            [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdin is not None
        theirs = int(process.stdout.readline())
        assert len({*mine, theirs}) == 3
        with pytest.raises(RunError, match="no free ports"), reserved_port(tmp_path):
            pass
        process.kill()  # whatever happens to its owner, the port is free again
        process.communicate()
        with reserved_port(tmp_path) as port:
            assert port == theirs
    with reserved_port(tmp_path) as port:
        assert port in {*mine, theirs}


def test_derived_ports_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ports._FIRST, ports._FIRST + ports._SPAN
    monkeypatch.setattr(ports, "_LAST", second + ports._SPAN)
    monkeypatch.setattr(ports, "_taken", lambda port: "busy" if port == first + 237 else None)
    for _ in range(5):
        with reserved_port(tmp_path) as port:
            assert port == second
