"""Scenario files: the shipped ones load, bad ones are refused with a reason."""

from pathlib import Path
from typing import Any

import pytest

from sglang_dwdp.planner.errors import PlannerError
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
        ({"mode": "magic"}, "dwdp, dep, replica"),
        ({"gpu": "abacus"}, "unknown GPU"),
        ({"lengths": 5}, "must be a mapping"),
        ({"lengths": {"mean": 3}}, "unknown lengths key 'mean'"),
        ({"speed": 3}, "unknown scenario key 'speed'"),
        ({"rate": 1.0, "concurrency": 4}, "not both"),
        ({"requests": 0}, "at least 1"),
        ({"jitter": -0.1}, "not be negative"),
        ({"slowdown": 0.0}, "positive"),
        ({"local_experts": 1}, "stores 4 to 8"),
        ({"lockstep": True}, "replica only"),
        ({"requests": "many"}, "requests must be a whole number, not 'many'"),
        ({"requests": 1.5}, "whole number"),
        ({"groups": True}, "whole number"),
        ({"chunked": "maybe"}, "chunked must be true or false"),
        ({"seed": -1}, "at least 0"),
        ({"rate": float("nan")}, "rate must be a finite number"),
        ({"frontend": float("inf")}, "frontend must be a finite number"),
        ({"lengths": {"length": 10.5}}, "length must be a whole number"),
        ({"lengths": {"length": 1000, "std": float("nan")}}, "std must be a finite number"),
        ({"group_size": 16}, "links 8 GPUs"),
        ({"groups": 10**9}, "at most 65,536"),
        ({"mode": "replica"}, "does not fit: 10[0-9] GB of weights"),
        ({"local_experts": -2, "mode": "dep"}, "at least 0"),
        ({"attention_format": "int1"}, "bf16, fp8"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlannerError, match=message):
        scenario_from_mapping({**GOOD, **change})


def test_missing_keys_are_named() -> None:
    with pytest.raises(PlannerError, match="there is no gpu, no lengths"):
        scenario_from_mapping({"model": "mixtral"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("scenarios: 3", "mapping of names"),
        ("scenarios: {}", "with one at least"),
        ("defaults: 3\nscenarios: {a: {mode: dep}}", "must be mappings of settings"),
        ("scenarios: {a: 3}", "defaults and scenario a must be mappings"),
        ("scenarios: {a: {mode: dep}}\nextra: 1", "unknown key of .* 'extra'"),
        ("scenarios: {first: {mode: dep}}", "scenario first: there is no model"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(PlannerError, match=message) as caught:
        load_scenarios(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="does not exist"):
        load_scenarios(str(tmp_path / "none.yaml"))
