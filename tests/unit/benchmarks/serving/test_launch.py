"""Command lines: what makes a server one of its kind, and that all kinds get the same chunk for a rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.serving import launch
from benchmarks.serving.read import scenario_from
from benchmarks.serving.scenario import Scenario
from sglang_dwdp import config


def scenario(gpus: int = 2, **variants: Any) -> Scenario:
    data = {
        "model": {"make": {"num_experts": 8}},
        "gpus": gpus,
        "chunk_tokens": 1000,
        "flags": {"random-seed": 1, "max_total_tokens": 5000},
        "load": {"lengths": {"length": 10}, "output_tokens": 4, "requests": 3, "rates": [1]},
        "variants": variants,
    }
    return scenario_from(data, "test")


@pytest.mark.parametrize(
    ("kind", "chunk", "needed"),
    [
        ("dwdp", 1000, {"tp-size": 2, "enable-dwdp": True}),
        ("in-tree", 2000, {"tp-size": 2, "dwdp-size": 2}),
        (
            "dep",
            2000,
            {"tp-size": 2, "attn-dp-size": 2, "ep-size": 2, "enable-dp-lm-head": True, "moe-dense-tp-size": 1},
        ),
        ("replicas", 1000, {"dp-size": 2}),
    ],
)
def test_kinds(kind: str, chunk: int, needed: dict[str, Any]) -> None:
    whole = scenario(v={"kind": kind})
    flags = launch.server_flags(whole, whole.variants[0])
    assert flags == needed | {"chunked-prefill-size": chunk, "random-seed": 1, "max-total-tokens": 5000}


def test_a_variants_flags_win_and_arguments_are_sglangs() -> None:
    whole = scenario(v={"kind": "dwdp", "flags": {"random-seed": 7, "dwdp-depth": 3, "enable-mixed-chunk": True}})
    command = launch.server_command("M", 1234, launch.server_flags(whole, whole.variants[0]))
    assert command[2:7] == ["sglang.launch_server", "--model-path", "M", "--host", "127.0.0.1"]
    assert command[command.index("--random-seed") + 1] == "7"
    assert command[command.index("--dwdp-depth") + 1] == "3"
    assert "--enable-mixed-chunk" in command
    assert "dwdp_depth" in config.option_names()
    assert launch.as_arguments({"a": False, "b": [1, 2]}) == ["--b", "1", "2"]


def test_the_cpu_engine() -> None:
    whole = scenario(0, ours={"kind": "dwdp", "ranks": 3}, replicas={"kind": "replicas", "environment": {"A": 1}})
    ours, replicas = whole.variants
    assert launch.server_flags(whole, ours)["device"] == "cpu"
    assert launch.server_environment(whole, ours, {}) == {"SGLANG_USE_CPU_ENGINE": "1"}
    added = launch.server_environment(whole, replicas, {})
    assert added["A"] == "1"
    assert added["SGLANG_USE_CPU_ENGINE"] == "1"
    assert whole.devices(ours) == 3


def test_a_disaggregated_variant() -> None:
    whole = scenario(4, v={"kind": "dwdp", "ranks": 2, "decode": {"ranks": 2, "flags": {"random-seed": 9}}})
    (variant,) = whole.variants
    prefill, decode = launch.prefill_flags(whole, variant, 777), launch.decode_flags(whole, variant)
    assert (prefill["disaggregation-mode"], decode["disaggregation-mode"]) == ("prefill", "decode")
    assert prefill["disaggregation-bootstrap-port"] == 777
    assert prefill["enable-dwdp"] is True
    assert prefill["chunked-prefill-size"] == 1000
    assert "enable-dwdp" not in decode
    assert (decode["attn-dp-size"], decode["random-seed"]) == (2, 9)
    assert decode["base-gpu-id"] == 2  # the GPUs after those that prefill
    assert "base-gpu-id" not in prefill
    one = dataclasses.replace(whole, one_gpu=True)
    assert "base-gpu-id" not in launch.decode_flags(one, variant)
    assert whole.devices(variant) == 4
