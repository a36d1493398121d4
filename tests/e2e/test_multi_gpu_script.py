"""The script as it is called, with engines of three ranks on SGLang's CPU engine: minutes, so make test-serving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


@pytest.mark.serving
def test_servers_of_three_ranks(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "multi_gpu.py"), "--cpu", "--ranks", "3"]
    command += ["--parts", "reads", "servers", "--variants", "dwdp", "in-tree", "replicas"]
    command += ["--out", str(out), "--logs", str(tmp_path / "logs"), "--time-limit", "800"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "not as it should be: reads\n" in done.stdout  # which was asked for, and needs GPUs
    report = json.loads(out.read_text())
    assert report["parts"]["reads"]["not_run"] == "it needs GPUs"
    servers = report["parts"]["servers"]
    assert servers["variants"]["in-tree"]["error"] == "cannot run: it needs GPUs"
    assert servers["reference"] == "replicas"
    for name in ("dwdp", "replicas"):
        tokens = servers["tokens"][name]
        assert tokens["answers"] == tokens["same_tokens"] == 3 * 3
        for row in (*servers["prefill"], *servers["decode"]):
            assert row["tokens_per_s"][name] > 0
    reports = servers["variants"]["dwdp"]["reports"]
    assert sorted(rank["rank"] for rank in reports) == [0, 1, 2]
    assert all(rank["staged_forwards"] and rank["direct_forwards"] and not rank["late_fills"] for rank in reports)
    assert len(servers["prefill"]) == 4
    assert len(servers["decode"]) == 2
    assert out.with_suffix(".png").exists()
    assert "not measured" in done.stdout
