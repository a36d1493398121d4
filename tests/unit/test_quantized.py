"""Checkpoints in quantised formats: what is written is what the formats say, and near what it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.families import make_checkpoint
from tests.fixtures.quantized import BLOCK, GROUP, to_block_fp8, to_mxfp4

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _files(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("size", [(256, 384), (200, 130), (1, 1)])
def test_block_fp8_comes_back(size: tuple[int, int]) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    quantized, scale = to_block_fp8(weight)
    assert quantized.shape == weight.shape
    assert scale.shape == (-(-size[0] // BLOCK), -(-size[1] // BLOCK))
    back = torch.empty(size)
    for row in range(size[0]):  # value by value, as the format says
        for column in range(size[1]):
            back[row, column] = quantized[row, column].float() * scale[row // BLOCK, column // BLOCK]
    assert (back - weight).norm() / weight.norm() < 0.04
    assert quantized.float().abs().max() == 448  # the largest of a block takes the whole range


def test_mxfp4_comes_back() -> None:
    weight = torch.randn(3, 5, 2 * GROUP, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[0, 0] = 0
    packed, scale = to_mxfp4(weight)
    assert packed.shape == (3, 5, 2, GROUP // 2)
    assert scale.shape == (3, 5, 2)
    back = torch.empty_like(weight)
    for expert in range(3):
        for row in range(5):
            for column in range(2 * GROUP):
                group, place = divmod(column, GROUP)
                byte = int(packed[expert, row, group, place // 2])
                code = byte >> 4 if place % 2 else byte & 15
                value = (-1 if code & 8 else 1) * _E2M1[code & 7]
                back[expert, row, column] = value * 2.0 ** (int(scale[expert, row, group]) - 127)
    assert (back - weight).norm() / weight.norm() < 0.15
    assert not back[0, 0].any()


def test_mxfp4_wants_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 32 inputs, not 40"):
        to_mxfp4(torch.zeros(2, 40))


def test_a_block_fp8_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", quantization="fp8-block", num_layers=2)
    tensors = _files(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    layer = "model.layers.1."
    for name in ("mlp.experts.3.up_proj", "mlp.shared_experts.down_proj", "self_attn.kv_a_proj_with_mqa"):
        assert tensors[f"{layer}{name}.weight"].dtype == torch.float8_e4m3fn
        assert tensors[f"{layer}{name}.weight_scale_inv"].dtype == torch.float32
    for name in ("mlp.gate.weight", "self_attn.q_a_layernorm.weight", "input_layernorm.weight"):
        assert tensors[layer + name].dtype == torch.bfloat16
        assert f"{layer}{name}_scale_inv" not in tensors
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


def test_an_mxfp4_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss", quantization="mxfp4", num_layers=2, moe_intermediate_size=64)
    tensors = _files(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    experts = "model.layers.1.mlp.experts."
    assert tensors[experts + "gate_up_proj_blocks"].shape == (8, 128, 3, 16)  # outputs first; 96 inputs
    assert tensors[experts + "down_proj_scales"].shape == (8, 96, 2)
    assert tensors[experts + "down_proj_bias"].dtype == torch.bfloat16
    assert experts + "gate_up_proj" not in tensors
