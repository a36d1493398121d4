"""Which weight formats of checkpoints DWDP can share the experts of, by what config.json says. Pure.

It is asked before anything is started. What a layer's experts became is looked at again when the model is constructed
(`backends`), since one checkpoint may have several formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_dwdp.errors import DwdpConfigError

SHARED = "bf16, FP8, NVFP4 or MXFP4, GPTQ, AWQ or compressed-tensors"
_SUPPORTED = frozenset(
    {
        "awq_marlin",
        "fp8",
        "gptq_marlin",
        "modelopt",
        "modelopt_fp4",
        "modelopt_fp8",
        "modelopt_mixed",
        "mxfp4",
        "unquant",
        "w8a8_fp8",
    }
)
_WNA16 = "SGLang runs it with kernels that were not examined"
_REASONS: Mapping[str, tuple[str, str]] = {  # why not, and what to use
    "awq": (_WNA16, "--quantization awq_marlin, and 4 bits"),
    "gptq": (_WNA16, "--quantization gptq_marlin, and 4 or 8 bits with symmetric groups"),
    "moe_wna16": (_WNA16, "--quantization gptq_marlin or awq_marlin"),
    "mxfp8": ("SGLang has it for Blackwell alone, where it was not examined", "FP8 with block scales"),
    "w4afp8": (
        "SGLang's kernel has strides and problem sizes of the experts that a rank loads",
        "int4 weights with 16-bit activations (GPTQ, AWQ, compressed-tensors)",
    ),
    "nvfp4_online": ("its loader makes scales from all experts' weights while they arrive", "an NVFP4 checkpoint"),
    "humming": ("its layout was not examined", "the checkpoint's own format"),
}
_GROUPS = {  # types and bits of weights and of activations
    ("float", 8, "float", 8),
    ("float", 4, None, None),
    ("float", 4, "float", 4),  # on Hopper SGLang leaves activations as they are
    ("int", 4, None, None),
    ("int", 8, None, None),
}


def check_quantization(quantization: str | None, config: Mapping[str, Any]) -> None:
    """Check that DWDP can share the experts of a checkpoint.

    Args:
        quantization: as SGLang resolved it from --quantization and config.json; None: none.
        config: `quantization_config` of config.json; empty where there is none.

    Raises:
        DwdpConfigError: their format is unsupported.
    """
    if quantization is None or quantization in _SUPPORTED:
        return
    name, reason, instead = quantization, "it was not examined", SHARED
    if quantization == "compressed-tensors":
        groups = [group for group in config.get("config_groups", {}).values() if group.get("weights")]
        if not groups or any(_is_supported(group) for group in groups):
            return
        name = f"compressed-tensors with {_describe(groups[0])}"
        instead = "FP8, int4, int8 or NVFP4 weights of compressed-tensors"
    elif quantization in _REASONS:
        reason, instead = _REASONS[quantization]
    raise DwdpConfigError(
        f"--enable-dwdp cannot be used here: experts in the format {name} are unsupported: {reason}. Use {instead}, or "
        "serve without --enable-dwdp."
    )


def _is_supported(group: Mapping[str, Any]) -> bool:
    weights, inputs = group["weights"], group.get("input_activations") or {}
    is_mx = weights.get("type") == "float" and weights.get("num_bits") == 4 and weights.get("group_size") != 16
    key = (weights.get("type"), weights.get("num_bits"), inputs.get("type"), inputs.get("num_bits"))
    return not is_mx and key in _GROUPS


def _describe(group: Mapping[str, Any]) -> str:
    def kind(part: Mapping[str, Any]) -> str:
        return f"{part.get('type')}{part.get('num_bits')}"

    inputs = group.get("input_activations")
    size = group["weights"].get("group_size")
    of_groups = f" in groups of {size}" if size else ""
    return f"{kind(group['weights'])} weights{of_groups}" + (f" and {kind(inputs)} activations" if inputs else "")
