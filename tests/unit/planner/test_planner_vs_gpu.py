"""The planner beside measured kernels: an H100's recorded ones, and that measuring works."""

import json
import sys
from pathlib import Path
from statistics import mean

import pytest

from tests import ROOT

sys.path.insert(0, str(ROOT))

from sglang_dwdp.planner.gpus import get_gpu, with_file

RECORDED = ROOT / "benchmarks" / "results" / "planner_vs_gpu_h100.json"
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def test_an_h100s_products_are_predicted_as_documented() -> None:
    pytest.importorskip("torch")
    from benchmarks.planner_vs_gpu import Problem

    gpu, errors = get_gpu("H100"), []
    for *problem, seconds in json.loads(RECORDED.read_text()):
        errors.append(abs(Problem(*problem).predicted(gpu) / seconds - 1))
    text = (ROOT / "docs" / "planner.md").read_text()
    assert f"mean {mean(errors):.1%}, worst {max(errors):.1%} of {len(errors)} products".replace("%", " %") in text


def test_what_is_measured_is_what_a_plan_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from benchmarks.planner_vs_gpu import main

    config, points, file = tmp_path / "tiny.json", tmp_path / "points.json", tmp_path / "gpu.yaml"
    config.write_text(json.dumps(TINY))
    command = ["planner_vs_gpu.py", str(config), "--device", "cpu", "--tokens", "64"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(points), "--gpu-file", str(file)])
    main()
    assert [row[0] for row in json.loads(points.read_text())] == ["dense", "dense", "grouped", "grouped", "attention"]
    assert all(row[-1] > 0 for row in json.loads(points.read_text()))
    found = with_file(get_gpu("H100"), str(file))
    assert 0 < found.efficiency.dense_gemm < 0.1  # a CPU
    assert found.sources["efficiency"].startswith(str(file))
