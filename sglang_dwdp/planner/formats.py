"""Weight formats: bytes per parameter, and which matrix units multiply them."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import PlannerError


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored and multiplied.

    Attributes:
        name: what users call it.
        bytes_per_param: bytes of storage per parameter, block scales included.
        compute: the matrix-unit format (``bf16``, ``fp8`` or ``fp4``) that a GPU with such
            units multiplies it in.
        weight_only: activations stay in 16 bits, so the product runs at the bf16 rate wherever
            the GPU has no unit for ``compute``.
    """

    name: str
    bytes_per_param: float
    compute: str
    weight_only: bool = False


# Scale bytes: FP8 as DeepSeek ships it has one fp32 per 128x128 block; NVFP4 one fp8 per 16
# values; MXFP4 and MXFP8 one 8-bit exponent per 32 values (OCP microscaling specification 1.0);
# INT4 one fp16 per group of 128.
FORMATS: dict[str, WeightFormat] = {
    fmt.name: fmt
    for fmt in (
        WeightFormat("bf16", 2.0, "bf16"),
        WeightFormat("fp8", 1.0 + 4 / (128 * 128), "fp8"),
        WeightFormat("mxfp8", 1.0 + 1 / 32, "fp8"),
        WeightFormat("nvfp4", 0.5 + 1 / 16, "fp4", weight_only=True),
        WeightFormat("mxfp4", 0.5 + 1 / 32, "fp4", weight_only=True),
        WeightFormat("int4", 0.5 + 2 / 128, "bf16", weight_only=True),
    )
}


def get_format(name: str) -> WeightFormat:
    """The format called ``name``.

    Raises:
        PlannerError: for an unknown name, with the known ones.
    """
    try:
        return FORMATS[name.lower()]
    except KeyError:
        raise PlannerError(f"unknown weight format {name!r}; known: {', '.join(sorted(FORMATS))}") from None


@dataclass(frozen=True)
class Precision:
    """Formats of one deployment.

    Attributes:
        experts: routed and shared experts and dense MLPs.
        projections: the linear layers of attention.
        attention: compute format of the attention product itself (``bf16`` or ``fp8``).
        kv_bytes: bytes per cached element.
        activation_bytes: bytes per element of activations between kernels.
        dispatch_bytes: bytes per element that DEP sends to the experts (the combine sends bf16).
    """

    experts: WeightFormat
    projections: WeightFormat
    attention: str = "bf16"
    kv_bytes: float = 2.0
    activation_bytes: float = 2.0
    dispatch_bytes: float = 2.0


def default_precision(fmt: WeightFormat) -> Precision:
    """The usual deployment of a checkpoint whose experts are stored as ``fmt``.

    FP8 checkpoints quantise the projections too; 4-bit ones leave them in bf16 and send
    activations to the experts in the experts' own format when both sides can.
    """
    if fmt.compute == "fp8":
        return Precision(fmt, fmt, dispatch_bytes=fmt.bytes_per_param)
    return Precision(fmt, FORMATS["bf16"])
