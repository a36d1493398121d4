"""Scenario files: the shipped ones work, and what is wrong with others is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.serving.scenario import ScenarioError, load_scenario
from benchmarks.serving.servers import server_command, server_flags, split_flags
from tests import ROOT

SHIPPED = sorted((ROOT / "benchmarks/scenarios/serving").glob("*.yaml"))
# Whatever departs from SGLang's defaults for how a forward runs would make the comparison another one.
FORBIDDEN = ("attention-backend", "moe-runner-backend", "cuda-graph", "disable-cuda-graph", "max-prefill-tokens")
RIGHT: dict[str, Any] = {
    "model": {"path": "m"},
    "gpus": 2,
    "loads": {"short": {"input_tokens": 8, "output_tokens": 4, "requests": 2, "rates": [1]}},
    "variants": {"dwdp": {"kind": "dwdp"}},
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_scenarios_are_at_defaults(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.description
    assert scenario.reference in scenario.variants
    for variant in scenario.variants.values():
        flags = server_flags(scenario, variant)
        assert not [flag for flag in flags if flag.startswith(FORBIDDEN) and scenario.gpus]
        if variant.decode:
            prefill, decode = split_flags(scenario, variant, 9)
            assert prefill["disaggregation-mode"] == "prefill"
            assert decode["disaggregation-mode"] == "decode"
            assert "enable-dwdp" not in decode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 1}, "unknown field `x`"),
        ({"gpus": "two"}, "Expected `int`, got `str` - at `\\$.gpus`"),
        ({"model": {}}, "give either path or make"),
        ({"reference": "dep"}, "reference: 'dep' is no variant"),
        ({"same_tokens": True}, "needs a reference"),
        ({"variants": {"a": {"kind": "b"}}}, "variants.a.kind: 'b' is none of dwdp"),
        ({"variants": {"a": {"kind": "tp", "flags": {"--x": 1}}}}, "write x without dashes"),
        ({"variants": {}}, "are at least 1"),
        ({"loads": {"x": {"input_tokens": 8, "output_tokens": 4, "requests": 2}}}, "loads.x: give rates, in_flight"),
        ({"loads": {"x": {"input_tokens": 8, "output_tokens": 0, "requests": 2, "rates": [1]}}}, "are at least 1"),
        ({"loads": {}}, "numbers of loads"),
        ({"loads": {"x": {"output_tokens": 4, "requests": 2, "rates": [1]}}}, "either input_tokens or bursty"),
    ],
)
def test_what_is_wrong(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(RIGHT | change))
    with pytest.raises(ScenarioError, match=message):
        load_scenario(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="No such file"):
        load_scenario(tmp_path / "none.yaml")


def test_command_and_precedence(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    more = {
        "chunk_tokens": 100,
        "together": 2,
        "flags": {"page-size": 16, "random-seed": 1},
        "variants": {
            "dep": {"kind": "dep", "flags": {"page-size": 32, "x": False, "y": [1, 2]}},
            "dwdp": {"kind": "dwdp"},
        },
    }
    path.write_text(yaml.safe_dump(RIGHT | more))
    scenario = load_scenario(path)
    command = server_command("m", 5, server_flags(scenario, scenario.variants["dep"]))
    text = " ".join(command)
    assert "--page-size 32" in text
    assert "--y 1 2" in text
    assert "--chunked-prefill-size 200" in text  # SGLang divides it
    assert "--enable-dp-attention" in command
    assert not {"--x", "--sleep-on-idle"} & set(command)  # ranks of expert parallelism wait for each other
    dwdp = server_flags(scenario, scenario.variants["dwdp"])
    assert dwdp["chunked-prefill-size"] == 100
    assert dwdp["sleep-on-idle"] is True
