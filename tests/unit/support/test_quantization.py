"""Formats of checkpoints by their config.json."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.quantization import check_quantization
from tests.fixtures.expert_formats import FORMATS

# As SGLang resolves them on a GPU.
RESOLVED = {"gptq": "gptq_marlin", "awq": "awq_marlin", "modelopt": "modelopt_fp4"}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_are_tested_pass(name: str) -> None:
    config = FORMATS[name].config
    method = config["quant_method"]
    check_quantization(RESOLVED.get(method, method), config)


def test_a_checkpoint_without_quantization_passes() -> None:
    check_quantization(None, {})
    check_quantization("fp8", {})


def group(bits: int, kind: str, inputs: tuple[str, int] | None = None, size: int | None = None) -> dict[str, Any]:
    activations = None if inputs is None else {"type": inputs[0], "num_bits": inputs[1]}
    return {"weights": {"type": kind, "num_bits": bits, "group_size": size}, "input_activations": activations}


@pytest.mark.parametrize(
    ("of_group", "named"),
    [
        (group(8, "int", ("int", 8)), "int8 weights and int8 activations"),
        (group(4, "int", ("float", 8), 128), "int4 weights in groups of 128 and float8 activations"),
        (group(4, "float", None, 32), "float4 weights in groups of 32"),
        (group(8, "float"), "float8 weights are"),
    ],
)
def test_groups_of_compressed_tensors(of_group: dict[str, Any], named: str) -> None:
    with pytest.raises(
        DwdpConfigError, match=f"compressed-tensors with {named}.*Use FP8, int4, int8 or NVFP4"
    ) as error:
        check_quantization("compressed-tensors", {"config_groups": {"group_0": of_group}})
    assert "\n" not in str(error.value)
    others = {"group_0": of_group, "group_1": group(4, "int")}  # which are the experts' is seen when they are made
    check_quantization("compressed-tensors", {"config_groups": others})


@pytest.mark.parametrize(
    ("method", "instead"),
    [("awq", "awq_marlin"), ("w4afp8", "int4 weights with 16-bit"), ("mxfp8", "FP8 with block"), ("gguf", "bf16, FP8")],
)
def test_other_formats_are_one_line_with_a_way_out(method: str, instead: str) -> None:
    with pytest.raises(DwdpConfigError, match=rf"experts in the format {method} are unsupported: .* Use .*{instead}"):
        check_quantization(method, {"quant_method": method})
