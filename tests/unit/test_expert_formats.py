"""Experts in formats of released checkpoints: value by value what the formats say, and near their originals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.expert_formats import AWQ_ORDER, E2M1, FORMATS, GROUP, GROUP_CT, Parts
from tests.fixtures.families import make_checkpoint

OUTPUTS, INPUTS, EXPERT = 16, 2 * GROUP, 3
ERRORS = {"fp8": 0.04, "gptq-int8": 0.01, "int8": 0.01, "nvfp4": 0.12}  # relative, by the name's beginning


def bits_of(word: int, place: int, bits: int) -> int:
    return (word >> (place * bits)) & ((1 << bits) - 1)


def of_fp8(parts: Parts, row: int, column: int) -> float:
    scale = parts["weight_scale"].reshape(-1)
    return float(parts["weight"][row, column].float() * scale[row if len(scale) > 1 else 0])


def of_ct_int(parts: Parts, row: int, column: int, bits: int) -> float:
    per_word = 32 // bits
    value = bits_of(int(parts["weight_packed"][row, column // per_word]), column % per_word, bits)
    return (value - (1 << (bits - 1))) * float(parts["weight_scale"][row, column // GROUP_CT])


def of_gptq(parts: Parts, row: int, column: int, bits: int) -> float:
    per_word, group = 32 // bits, int(parts["g_idx"][column])
    value = bits_of(int(parts["qweight"][column // per_word, row]), column % per_word, bits)
    zero = bits_of(int(parts["qzeros"][group, row // per_word]), row % per_word, bits) + 1
    return (value - zero) * float(parts["scales"][group, row])


def of_awq(parts: Parts, row: int, column: int) -> float:
    place, group = AWQ_ORDER.index(row % 8), column // GROUP
    value = bits_of(int(parts["qweight"][column, row // 8]), place, 4)
    zero = bits_of(int(parts["qzeros"][group, row // 8]), place, 4)
    return (value - zero) * float(parts["scales"][group, row])


def of_nvfp4(parts: Parts, row: int, column: int) -> float:
    values = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    code = bits_of(int(values[row, column // 2]), column % 2, 4)
    scale = float(parts["weight_scale"][row, column // 16].float())
    if "weight_scale_2" in parts:
        scale *= float(parts["weight_scale_2"])
    else:
        scale /= float(parts["weight_global_scale"])
    return (-1 if code & 8 else 1) * E2M1[code & 7] * scale


def value(name: str, parts: Parts, row: int, column: int) -> float:
    """One weight, read as the format says."""
    if name.startswith("fp8"):
        return of_fp8(parts, row, column)
    if name.startswith("nvfp4"):
        return of_nvfp4(parts, row, column)
    if name == "awq":
        return of_awq(parts, row, column)
    bits = int(name[-1])
    return of_gptq(parts, row, column, bits) if name.startswith("gptq") else of_ct_int(parts, row, column, bits)


@pytest.mark.parametrize("name", FORMATS)
def test_experts_come_back(name: str) -> None:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) * 0.1
    parts = FORMATS[name].pack(weight, EXPERT)
    back = torch.tensor([[value(name, parts, row, column) for column in range(INPUTS)] for row in range(OUTPUTS)])
    allowed = next((error for begin, error in ERRORS.items() if name.startswith(begin)), 0.15)
    assert (back - weight).norm() / weight.norm() < allowed


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-modelopt", "nvfp4", "nvfp4-modelopt", "gptq-int8"])
def test_experts_differ_in_what_belongs_to_a_matrix(name: str) -> None:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) * 0.1
    one, other = (FORMATS[name].pack(weight, expert) for expert in (0, 1))
    small = [end for end in one if end in ("g_idx", "input_scale", "input_global_scale", "weight_scale_2")]
    assert small
    assert all(not torch.equal(one[end], other[end]) for end in small)


def test_a_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "kimi_k2", quantization="int4", num_layers=2, hidden_size=128, moe_intermediate_size=64)
    tensors: Parts = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= load_file(file)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    expert = "model.layers.1.mlp.experts.3."
    assert tensors[f"{expert}gate_proj.weight_packed"].shape == (64, 16)
    assert tensors[f"{expert}down_proj.weight_scale"].shape == (128, 2)
    assert tensors[f"{expert}up_proj.weight_shape"].tolist() == [64, 128]
    assert f"{expert}up_proj.weight" not in tensors
    for name in ("self_attn.o_proj", "mlp.shared_experts.up_proj", "mlp.gate"):
        assert tensors[f"model.layers.1.{name}.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
