"""Scenario files: the shipped ones load, bad ones are reported with a reason."""

from pathlib import Path
from typing import Any

import pytest

from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.scenario import load_scenarios, scenario_from_mapping
from tests import ROOT

SHIPPED = sorted((ROOT / "benchmarks" / "scenarios").glob("*.yaml"))
GOOD = {"model": "mixtral", "gpu": "H100", "lengths": {"length": 1000}, "group_size": 2}


def test_there_are_shipped_scenarios() -> None:
    assert len(SHIPPED) >= 3


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_scenarios_load(path: Path) -> None:
    assert load_scenarios(str(path))


def test_formats_can_be_set_one_by_one() -> None:
    scenario = scenario_from_mapping(
        {**GOOD, "weight_format": "nvfp4", "projection_format": "fp8", "attention_format": "fp8"}
    )
    assert scenario.precision.experts.name == "nvfp4"
    assert scenario.precision.projections.name == "fp8"
    assert scenario.precision.attention == "fp8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "magic"}, "mode: .*, not 'magic'"),
        ({"gpu": "abacus"}, "unknown GPU"),
        ({"lengths": 5}, "must be a mapping"),
        ({"lengths": {"mean": 3}}, "lengths: mean: "),
        ({"speed": 3}, "speed: "),
        ({"rate": 1.0, "concurrency": 4}, "not both"),
        ({"requests": 0}, "requests: .* equal to 1, not 0"),
        ({"frontend": -0.1}, "frontend: .* equal to 0"),
        ({"local_experts": 1}, "stores 4 to 8"),
        ({"requests": "many"}, "requests: .* integer, not 'many'"),
        ({"requests": 1.5}, "requests: .* integer"),
        ({"groups": True}, "groups: .* integer"),
        ({"chunked": "maybe"}, "chunked: .* boolean"),
        ({"seed": -1}, "seed: "),
        ({"rate": float("nan")}, "rate: "),
        ({"frontend": float("inf")}, "frontend: .* finite number"),
        ({"lengths": {"length": 10.5}}, "length: .* integer"),
        ({"group_size": 16}, "links 8 GPUs"),
        ({"groups": 10**9}, "at most 65,536"),
        ({"mode": "replica"}, "needs 10[0-9] GB for weights and activations and does not fit the 80 GB"),
        ({"local_experts": -2, "mode": "dep"}, "local_experts: "),
        ({"attention_format": "int1"}, "bf16, fp8"),
        ({"weight_format": "int1"}, "unknown weight format"),
    ],
)
def test_bad_settings_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlannerError, match=message):
        scenario_from_mapping({**GOOD, **change})


def test_missing_keys_are_named() -> None:
    with pytest.raises(PlannerError, match="missing: gpu, lengths"):
        scenario_from_mapping({"model": "mixtral"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("scenarios: 3", "a mapping of names"),
        ("scenarios: {}", "a mapping of names"),
        ("defaults: 3\nscenarios: {a: {mode: dep}}", "must be mappings"),
        ("scenarios: {a: 3}", "must be mappings"),
        ("scenarios: {a: {mode: dep}}\nextra: 1", "nothing else"),
        ("scenarios: {first: {mode: dep}}", "scenario first: missing: model"),
    ],
)
def test_bad_files_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(PlannerError, match=message) as caught:
        load_scenarios(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="No such file"):
        load_scenarios(str(tmp_path / "none.yaml"))
