"""benchmarks/engines.py as it is called, with engines of two ranks on SGLang's CPU engine: minutes, so test-serving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


@pytest.mark.serving
def test_engines_of_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "engines.py"), "--device", "cpu", "--out", str(out)]
    command += ["--variants", "dwdp", "dep", "replicas", "--cases", "prefill:96", "decode:2", "--tokens"]
    command += ["--repeats", "1", "--prompts-per-rank", "2", "--decode-tokens", "256", "--time-limit", "800"]
    done = subprocess.run(
        command, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| prefill:96 |" in done.stdout
    assert "- dep: cannot run: it needs GPUs" in done.stdout
    result = json.loads((out / "results.json").read_text())
    assert result["tokens"]["dwdp"]["same_tokens"] == result["tokens"]["dwdp"]["answers"] == 2 * 64
    prefill, decode = result["cases"]
    for row in (prefill, decode):
        assert {name: len(rates) for name, rates in row["rates"].items()} == {"dwdp": 1, "replicas": 1}
        assert all(rate > 0 for rates in row["rates"].values() for rate in rates)
    assert [rank["staged_forwards"] for rank in prefill["counters"]["dwdp"]] == [2, 2]
    assert all(rank["direct_forwards"] >= 24 and not rank["late_fills"] for rank in decode["counters"]["dwdp"])
    assert sorted(state["dwdp"]["rank"] for state in result["variants"]["dwdp"]["states"]) == [0, 1]
