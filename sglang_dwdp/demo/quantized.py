"""Random checkpoints in the quantised formats that models are released in: block-FP8 and MXFP4.

Names and layouts are those of DeepSeek's FP8 checkpoints (`weight_scale_inv`, blocks of 128 by 128) and of gpt-oss
(`…_blocks` and `…_scales`, groups of 32 along the inputs; OCP's Microscaling Formats Specification 1.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch

Quantization = Literal["none", "fp8-block", "mxfp4"]
BLOCK = 128
GROUP = 32
_FP8_MAX = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_EXPONENT = 2  # of its largest value
_E8M0_BIAS = 127
_NOT_FP8 = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "block_sparse_moe.gate.", "shared_expert_gate", "router")


def config(quantization: Quantization, num_layers: int) -> dict[str, Any]:
    """What config.json says of it, as released checkpoints do."""
    if quantization == "fp8-block":
        gates = [f"model.layers.{layer}.mlp.gate" for layer in range(num_layers)]
        return {
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "weight_block_size": [BLOCK, BLOCK],
                "modules_to_not_convert": ["lm_head", *gates],
            }
        }
    if quantization == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}}
    return {}


def quantize(weights: Mapping[str, torch.Tensor], quantization: Quantization) -> dict[str, torch.Tensor]:
    """The tensors of a bf16 checkpoint in another format; what the format leaves alone is kept.

    fp8-block: every matrix `[rows, columns]` of a linear layer, and its `weight_scale_inv`.
    mxfp4: gpt-oss's expert tensors, `[experts, inputs, outputs]`.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if quantization == "fp8-block" and tensor.ndim == 2 and not any(part in name for part in _NOT_FP8):
            result[name], result[name + "_scale_inv"] = to_block_fp8(tensor)
        elif quantization == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            result[name + "_blocks"], result[name + "_scales"] = to_mxfp4(tensor.transpose(1, 2))
        else:
            result[name] = tensor
    return result


def to_block_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn `[rows, columns]` and the float32 scale of each block `[⌈rows/128⌉, ⌈columns/128⌉]`."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / _FP8_MAX
    scaled = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scale


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two E2M1 values in a byte, uint8 `[…, inputs/32, 16]`, the first one in the lower half; and E8M0 scales, uint8
    `[…, inputs/32]`. `weight` is `[…, inputs]`.

    Raises:
        ValueError: the inputs are no multiple of 32.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(f"MXFP4 wants a multiple of {GROUP} inputs, not {weight.shape[-1]}")
    groups = weight.float().reshape(*weight.shape[:-1], weight.shape[-1] // GROUP, GROUP)
    exponent = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - _E2M1_EXPONENT
    scaled = groups / exponent.exp2()[..., None]
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(_E2M1)])
    code = torch.bucketize(scaled.abs().contiguous(), middles).to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
    packed = code[..., 0::2] | (code[..., 1::2] << 4)
    return packed.contiguous(), (exponent + _E8M0_BIAS).to(torch.uint8)
