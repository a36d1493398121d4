"""What docs/usage.md says that the simulator gives is what it gives."""

from __future__ import annotations

import json

import pytest

from sglang_dwdp import cli
from tests import ROOT

NAMES = {"DWDP4 on 12, requests handed out by count": "DWDP4 on 12, by count"}
NAMES |= {"DWDP4 on 12, 8K tokens per forward": "DWDP4 on 12, 8K chunks"}


def table() -> dict[str, list[str]]:
    """The rows of the table of prefill GPUs, by scenario."""
    text = (ROOT / "docs" / "usage.md").read_text()
    lines = text.split("| prefill GPUs |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {NAMES.get(name, name): cells for name, *cells in rows}


def test_the_table_of_prefill_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    scenario = ROOT / "benchmarks" / "scenarios" / "rate_matching.yaml"
    assert cli.main(["simulate", "--scenario", str(scenario), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    written = {}
    for row in found:
        times = [f"{row['ttft_seconds'][name]:.2f} s" for name in ("p50", "p99")]
        written[row["scenario"]] = [f"{row['tokens_per_second_per_gpu']:,.0f}", *times]
    assert table() == written
