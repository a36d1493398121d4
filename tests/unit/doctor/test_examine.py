"""The doctor on this machine, whatever it has."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from sglang_dwdp.doctor import examine
from sglang_dwdp.doctor.facts import Facts
from tests.unit.doctor.test_findings import GOOD


def test_two_processes_share_host_memory() -> None:
    share = examine.try_transport("host-shm", 0)
    assert share.error == ""
    assert [(copy.reader, copy.source) for copy in share.copies] == [(0, 1), (1, 0)]
    assert all(copy.bytes_per_s > 0 for copy in share.copies)


def test_the_process_that_failed_says_why() -> None:
    """Rank 1 asks for a transport that there is not, and its peer hears of it."""
    first, second = (
        ["share", transport, str(rank), "2", "0", "a group"] for rank, transport in enumerate(("host-shm", "no"))
    )
    (peer, failed) = examine.run_probes([first, second])
    assert failed["error"] == "KeyError: 'no'"
    assert not failed["is_peers"]
    assert peer["is_peers"]
    assert "rank 1 failed: 'no'" in peer["error"]


def test_a_probe_that_does_not_end_is_killed() -> None:
    started = time.monotonic()
    (answer,) = examine.run_probes([["share", "host-shm", "0", "2", "0", "alone"]], limit_s=0.5)
    assert answer == {"error": "no answer in time"}
    assert time.monotonic() - started < 30


def test_a_probe_that_crashes_is_an_answer() -> None:
    assert examine._answer("torch says\nSegmentation fault\n", -11) == {
        "error": "its process ended with code -11: Segmentation fault"
    }


@pytest.mark.parametrize("is_json", [True, False])
def test_the_command(is_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sglang_dwdp import cli
    from sglang_dwdp.doctor import command

    facts: list[Facts] = [GOOD]
    monkeypatch.setattr(command, "examine", lambda: facts[0])
    assert cli.main(["doctor", *["--json"] * is_json]) == 0
    out = capsys.readouterr().out
    if is_json:
        assert json.loads(out)["facts"]["driver"] == GOOD.driver
    assert "can serve with DWDP on 2 GPUs" in out
    facts[0] = Facts(failed={"software": "[no] module"})
    assert cli.main(["doctor", *["--json"] * is_json]) == 1
    assert "[no] module" in capsys.readouterr().out


def test_a_real_run() -> None:
    """Half a minute: SGLang's sources are hashed, memory is shared, and nothing is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang_dwdp.cli", "doctor", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["facts"]["changed"] == []
    assert answer["facts"]["failed"] == {}
    status = {finding["check"]: finding["status"] for finding in answer["findings"]}
    assert status["hooked sources"] == "ok"
    if not answer["facts"]["gpus"]:
        assert status["host-shm"] == "ok"
        assert status["GPUs"] == "unchecked"
