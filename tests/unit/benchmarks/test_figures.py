"""The script of docs/performance.md's figures: every command that it would run is one that its program takes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import engines
from benchmarks.processes import ROOT
from benchmarks.serving.scenario import load_scenario
from benchmarks.variants import engine_options
from sglang_dwdp.planner.models import load_model

STEPS = ("two", "tokens", "served", "large", "formats", "four", "r1")


def commands(out: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks/figures.sh"), str(out), *steps]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_every_command_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = commands(tmp_path, *STEPS)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        step, _, command = line.partition(": ")
        found[step] = shlex.split(command)[1:]
    assert list(found) == list(STEPS)
    large = load_model(str(tmp_path / "large.json"))
    assert (large.experts, large.moe_intermediate, large.expert_format) == (256, 768, "bf16")
    script, scenario, *_ = found.pop("served")
    assert (script, load_scenario(Path(scenario)).gpus) == ("benchmarks/compare_serving.py", 2)
    for step, (script, *words) in found.items():
        assert script == "benchmarks/engines.py"
        args, variants = engines.parse(words)
        ranks = 4 if step in ("four", "r1") else 2
        args.model = args.model or str(tmp_path)  # makes no checkpoint
        setting = engines.setting_of(args, variants, ranks)
        for variant in variants:
            model = engine_options(variant, setting)["model_path"]
            assert model == str(tmp_path) or (ROOT / model / "config.json").is_file()


def test_an_unknown_step_is_named(tmp_path: Path) -> None:
    done = commands(tmp_path, "tow")
    assert done.returncode == 2
    assert "tow is none of two, tokens" in done.stderr


def test_the_shape_of_deepseek_r1() -> None:
    """As released, but for its number of layers."""
    model, released = load_model(str(ROOT / "benchmarks/models/r1")), load_model("deepseek-r1")
    assert model.experts == released.experts == 256
    assert (model.hidden, model.moe_intermediate, model.top_k) == (
        released.hidden,
        released.moe_intermediate,
        released.top_k,
    )
    assert model.expert_format == released.expert_format
