"""What the documentation says that the simulator gives is what it gives."""

from __future__ import annotations

import json
import re

import pytest

from sglang_dwdp import cli
from tests import ROOT

WRITTEN = (
    r"(DWDP4 on 12) GPUs has ([\d,]+) tok/s per GPU and a median TTFT of ([\d.]+) s, "
    r"(DEP4 on 16) has ([\d,]+) and ([\d.]+) s\."
)


def test_the_figures_of_fewer_prefill_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    scenario = ROOT / "benchmarks" / "scenarios" / "rate_matching.yaml"
    assert cli.main(["simulate", "--scenario", str(scenario), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["scenario"]: row for row in found}
    text = " ".join((ROOT / "docs" / "usage.md").read_text().split())
    [words] = re.findall(WRITTEN, text)
    for name, rate, ttft in (words[:3], words[3:]):
        assert float(rate.replace(",", "")) == pytest.approx(rows[name]["tokens_per_second_per_gpu"], rel=0.02)
        assert float(ttft) == pytest.approx(rows[name]["ttft_seconds"]["p50"], rel=0.02)
