"""What the documentation says that the simulator gives is what it gives."""

from __future__ import annotations

import json

import pytest

from sglang_dwdp import cli
from tests import ROOT

NAMES = {"DWDP4 on 12, requests handed out by count": "DWDP4 on 12, by count"}
NAMES |= {"DWDP4 on 12, 8K tokens per forward": "DWDP4 on 12, 8K chunks", "EP on 16 (DEP4)": "DEP4 on 16"}
HEAD = "| prefill GPUs |"


def table() -> dict[str, list[float]]:
    """The rows of the table of prefill GPUs, by scenario: tokens/s per GPU, TTFT median and p99 in seconds."""
    text = next(text for file in (ROOT / "docs").glob("*.md") if HEAD in (text := file.read_text()))
    lines = text.split(HEAD, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        NAMES.get(name, name): [float(c.replace(",", "").removesuffix(" s")) for c in cells] for name, *cells in rows
    }


def test_the_table_of_prefill_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    scenario = ROOT / "benchmarks" / "scenarios" / "rate_matching.yaml"
    assert cli.main(["simulate", "--scenario", str(scenario), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    written = table()
    assert {row["scenario"] for row in found} == set(written)
    for row in found:
        figures = [row["tokens_per_second_per_gpu"], row["ttft_seconds"]["p50"], row["ttft_seconds"]["p99"]]
        assert written[row["scenario"]] == pytest.approx(figures, rel=0.02)
