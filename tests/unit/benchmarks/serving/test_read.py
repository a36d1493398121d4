"""Scenario files: the shipped ones load, and one that cannot work says what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.errors import ScenarioError
from benchmarks.serving.read import load_scenario, scenario_from
from benchmarks.serving.scenario import Point
from tests import ROOT

SHIPPED = sorted((ROOT / "benchmarks" / "scenarios" / "serving").glob("*.yaml"))
GOOD: dict[str, Any] = {
    "model": {"path": "Qwen/Qwen3-30B-A3B"},
    "gpus": 8,
    "load": {
        "lengths": {"kind": "uniform", "length": 8192, "ratio": 0.8},
        "output_tokens": 1024,
        "requests": 64,
        "rates": [1, "inf"],
        "concurrencies": [32],
    },
    "variants": {"ours": {"kind": "dwdp"}, "single": {"kind": "single"}},
}


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with keys such as `load__requests` set; None takes a key away."""
    data = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *above, last = path.split("__")
        place = data
        for key in above:
            place = place.setdefault(key, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    return data


def test_shipped_scenarios() -> None:
    names = [path.stem for path in SHIPPED]
    assert {"smoke_cpu", "one_gpu", "eight_gpu_8k_1k", "bursty"} <= set(names)
    for path in SHIPPED:
        assert load_scenario(path).description


def test_a_good_one() -> None:
    scenario = scenario_from(GOOD, "good")
    ours, single = scenario.variants
    assert (ours.ranks, single.ranks, scenario.reference) == (8, 1, "ours")
    assert scenario.load.points() == (Point("rate", 1.0), Point("rate", float("inf")), Point("concurrency", 32))
    assert [point.key for point in scenario.load.points()] == ["rate-1", "rate-inf", "concurrency-32"]
    assert [scenario.devices(variant) for variant in scenario.variants] == [8, 1]


CASES: list[tuple[dict[str, Any], str]] = [
    (changed(gpus=None), "gpus is missing"),
    (changed(gpu=3), "unknown key gpu; known: check, chunk_tokens"),
    (changed(gpus="eight"), "gpus must be a whole number, not 'eight'"),
    (changed(gpus=-1), "gpus must be at least 0"),
    (changed(one_gpu=True), "one_gpu needs gpus: 1, not 8"),
    (changed(model__make={"num_experts": 8}), "model needs either path"),
    (changed(model__path="/no/such/folder"), "model.path /no/such/folder is no folder with a config.json"),
    (changed(model={"make": {"familly": "x"}}), "unknown key model.make.familly"),
    (changed(model={"make": {"family": "llama"}}), "model.make.family 'llama' is none of qwen3_moe"),
    (changed(model={"make": {"dtype": "int4"}}), "model.make.dtype 'int4' is none of"),
    (changed(model={"make": {"num_experts": "many"}}), "model.make.num_experts must be a whole number"),
    (changed(load__lengths=None), "load.lengths is missing"),
    (changed(load__lengths__kind="zipf"), "load.lengths: unknown length distribution 'zipf'"),
    (changed(load__lengths__length="long"), "load.lengths: "),
    (changed(load__rates=3), "load.rates must be a list"),
    (changed(load__rates=[0]), "load.rates must be above 0"),
    (changed(load__rates=[], load__concurrencies=[]), "load needs rates"),
    (changed(load__concurrencies=[1.5]), "load.concurrencies must be a whole number"),
    (changed(load__order="shuffled"), "load.order 'shuffled' is none of drawn, long_to_one_rank"),
    (changed(load__order="long_to_one_rank"), "needs finite rates alone"),
    (changed(load__order="long_to_one_rank", load__rates=[1]), "needs finite rates alone"),
    (changed(load__requests=0), "load.requests must be at least 1"),
    (changed(variants={}), "variants is empty"),
    (changed(variants=["dwdp"]), "variants must be a mapping"),
    (changed(variants__ours__kind="dwpd"), "variants.ours.kind 'dwpd' is none of dwdp, in-tree"),
    (changed(variants__ours__ranks=16), "variants.ours needs 16 GPUs, and gpus is 8"),
    (changed(variants__ours__ranks=1), "kind dwdp needs 2 ranks or more"),
    (changed(variants__single__ranks=2), "kind single has 1 rank"),
    (changed(variants__ours__flags={"--depth": 3}), "write flags without dashes, as depth"),
    (changed(variants__ours__flags={"depth": {"a": 1}}), "variants.ours.flags.depth must be a value"),
    (changed(variants__ours__decode={"transfer_backend": "tcp"}), "transfer_backend 'tcp' is none of"),
    (changed(variants__ours__decode={"ranks": 1}), "variants.ours needs 9 GPUs"),
    (changed(reference="theirs"), "reference 'theirs' is none of the variants ours, single"),
    (changed(port=70000), "port must be at most 65000"),
    (changed(together=0), "together must be at least 1"),
    (changed(together=2, port=9000), "leave port out"),
    (changed(check={"requests": 0, "must_equal": True}), "check.must_equal compares nothing with check.requests 0"),
    (changed(check={"requests": 2, "must_equal": "yes"}), "check.must_equal must be true or false, not 'yes'"),
]


@pytest.mark.parametrize(("data", "message"), CASES, ids=[message for _, message in CASES])
def test_bad_ones(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario_from(data, "bad")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_names() -> None:
    with pytest.raises(ScenarioError, match=r"variants\.a/b: a name is made of letters"):
        scenario_from(changed(variants={"a/b": {"kind": "dwdp"}}), "bad")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not valid YAML"), ("- 3", "the file must be a mapping"), ("", "must be a mapping")],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=message) as caught:
        load_scenario(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="there is no scenario file"):
        load_scenario(tmp_path / "none.yaml")


def test_a_fingerprint_changes_with_what_a_result_depends_on() -> None:
    base = scenario_from(GOOD, "good")
    ours, single = base.variants

    def prints(data: dict[str, Any]) -> list[str]:
        scenario = scenario_from(data, "good")
        return [scenario.fingerprint(variant) for variant in scenario.variants]

    before = [base.fingerprint(ours), base.fingerprint(single)]
    assert before[0] != before[1]
    assert prints(changed(reference="single", start_timeout_s=3.0)) == before
    assert all(a != b for a, b in zip(prints(changed(load__requests=65)), before, strict=True))
    other = prints(changed(variants__ours__flags={"dwdp-depth": 3}))
    assert (other[0] != before[0], other[1] == before[1]) == (True, True)
