"""Weight formats: their names, bytes per parameter, and which matrix units multiply them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dwdp.planner.checks import PlannerError


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored and multiplied.

    Attributes:
        name: what users call it.
        bytes_per_param: bytes of storage per parameter, block scales included.
        compute: the matrix-unit format (`bf16`, `fp8` or `fp4`) that a GPU with such units multiplies it in.
        weight_only: activations stay in 16 bits, so the product runs at the bf16 rate wherever the GPU has no unit for
            `compute`.
        names: parts of the names that checkpoints give it.
    """

    name: str
    bytes_per_param: float
    compute: str
    weight_only: bool = False
    names: tuple[str, ...] = ()


# Scale bytes: FP8 as DeepSeek ships it has one fp32 per 128x128 block; NVFP4 one fp8 per 16
# values; MXFP4 and MXFP8 one 8-bit exponent per 32 values (OCP microscaling specification 1.0);
# INT4 one fp16 per group of 128. In the order in which names are looked for.
FORMATS: dict[str, WeightFormat] = {
    fmt.name: fmt
    for fmt in (
        WeightFormat("bf16", 2.0, "bf16"),
        WeightFormat("nvfp4", 0.5 + 1 / 16, "fp4", weight_only=True, names=("nvfp4", "modelopt_fp4")),
        WeightFormat("mxfp4", 0.5 + 1 / 32, "fp4", weight_only=True, names=("mxfp4",)),
        WeightFormat("mxfp8", 1.0 + 1 / 32, "fp8", names=("mxfp8",)),
        WeightFormat("fp8", 1.0 + 4 / (128 * 128), "fp8", names=("fp8", "e4m3", "float-quantized")),
        WeightFormat("int4", 0.5 + 2 / 128, "bf16", weight_only=True),
    )
}
_INT4_METHODS = {"awq", "gptq", "compressed-tensors", "auto-round"}  # where they store 4 bits


def get_format(name: str) -> WeightFormat:
    """The format called `name`.

    Raises:
        PlannerError: for an unknown name, with the known ones.
    """
    try:
        return FORMATS[name.lower()]
    except KeyError:
        raise PlannerError(f"unknown weight format {name!r}; known: {', '.join(sorted(FORMATS))}") from None


def format_of_config(quantization: Mapping[str, Any]) -> str:
    """The weight format behind the `quantization_config` of a `config.json`.

    Returns:
        A name of `FORMATS`, or the config's own name where none fits, which `get_format` then reports.
    """
    method = str(quantization.get("quant_method") or "").lower()
    names = " ".join(str(quantization.get(key) or "") for key in ("quant_algo", "fmt", "format"))
    for fmt in FORMATS.values():
        if any(name in f"{method} {names}".lower() for name in fmt.names):
            return fmt.name
    bits = quantization.get("bits", 4)
    for group in (quantization.get("config_groups") or {}).values():  # compressed-tensors
        bits = (group.get("weights") or {}).get("num_bits", bits)
    return "int4" if method.split("_")[0] in _INT4_METHODS and int(bits) == 4 else method or "bf16"


@dataclass(frozen=True)
class Precision:
    """Formats of one deployment.

    Attributes:
        experts: routed and shared experts and dense MLPs.
        projections: the linear layers of attention.
        attention: compute format of the attention product itself.
        activation_bytes: bytes per element of activations between kernels.
        dispatch_bytes: bytes per element that an all-to-all sends to the experts (it combines in bf16).
    """

    experts: WeightFormat
    projections: WeightFormat
    attention: str = "bf16"
    activation_bytes: float = 2.0
    dispatch_bytes: float = 2.0


def default_precision(fmt: WeightFormat) -> Precision:
    """The usual deployment of a checkpoint whose experts are stored as `fmt`.

    FP8 checkpoints quantise the projections too and send FP8 to the experts; 4-bit ones leave both in bf16.
    """
    if fmt.compute == "fp8":
        return Precision(fmt, fmt, dispatch_bytes=fmt.bytes_per_param)
    return Precision(fmt, FORMATS["bf16"])
