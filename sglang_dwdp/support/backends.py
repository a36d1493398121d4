"""What is known of each way to run a MoE layer on a GPU: which ones may read shared experts. Pure.

A way is SGLang's class for the weight format and the MoE runner backend that a layer ended up with. One that is not
listed was not examined, and is refused: it may have sized something by the experts that a rank loaded, which gives
wrong tokens and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from sglang_dwdp.errors import DwdpConfigError

FLASHINFER_FP8 = "dwdp_flashinfer_fp8"
"""The backend that this package adds: block-FP8 through FlashInfer (see `moe`)."""


class Status(Enum):
    """VERIFIED: compared with a single rank, see docs/support.md.  UNVERIFIED: fits by reading SGLang's code."""

    VERIFIED = "verified"
    UNVERIFIED = "unverified"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a MoE layer.

    method: SGLang's class for the format.  backend: the value of its runner backend.
    weights: the format in words.  gpus: generations that SGLang has it for.  reason: why it is refused.
    """

    method: str
    backend: str
    weights: str
    gpus: tuple[str, ...]
    status: Status
    reason: str = ""


_HOPPER = ("Hopper",)
_BLACKWELL = ("Blackwell",)
_BOTH = ("Hopper", "Blackwell")
_BF16, _FP8, _MXFP4, _NVFP4 = (
    "UnquantizedFusedMoEMethod",
    "Fp8MoEMethod",
    "Mxfp4MoEMethod",
    "ModelOptNvFp4FusedMoEMethod",
)
_NVFP4_SCALES = (
    "SGLang takes a rank's part of the checkpoint's input scales by its place in expert parallelism, so every rank "
    "would get those of the first experts"
)

WAYS = (
    Way(_BF16, "triton", "bf16", _BOTH, Status.VERIFIED),
    Way(_BF16, "flashinfer_cutlass", "bf16", _BOTH, Status.VERIFIED),
    Way(_BF16, "deep_gemm", "bf16", _BOTH, Status.VERIFIED),
    Way(_BF16, "flashinfer_trtllm", "bf16", _BLACKWELL, Status.UNVERIFIED),
    Way(_BF16, "flashinfer_trtllm_routed", "bf16", _BLACKWELL, Status.UNVERIFIED),
    Way(
        _BF16,
        "triton_kernel",
        "bf16",
        _BOTH,
        Status.REFUSED,
        "its own routing and weight layout were not examined",
    ),
    Way(_FP8, "triton", "block-FP8", _BOTH, Status.VERIFIED),
    Way(_FP8, "deep_gemm", "block-FP8", _BOTH, Status.VERIFIED),
    Way(_FP8, FLASHINFER_FP8, "block-FP8", _HOPPER, Status.VERIFIED),
    Way(_FP8, "flashinfer_trtllm", "block-FP8", _BLACKWELL, Status.UNVERIFIED),
    Way(_FP8, "flashinfer_trtllm_routed", "block-FP8", _BLACKWELL, Status.UNVERIFIED),
    Way(
        _FP8,
        "cutlass",
        "block-FP8",
        _BOTH,
        Status.REFUSED,
        "it makes its tables of pointers and strides for the experts that a rank loads, before they are shared",
    ),
    Way(
        _FP8,
        "hpc_ops",
        "block-FP8",
        _HOPPER,
        Status.REFUSED,
        "the padded scales that it keeps beside the checkpoint's were not examined",
    ),
    Way(_MXFP4, "flashinfer_mxfp4", "MXFP4", _BOTH, Status.VERIFIED),
    Way(
        _MXFP4,
        "triton_kernel",
        "MXFP4",
        _BOTH,
        Status.REFUSED,
        "it swizzles all experts' weights and scales together into objects of its own",
    ),
    Way(_MXFP4, "triton", "MXFP4", _BOTH, Status.VERIFIED),  # SGLang turns the weights into bf16, four times the size
    Way(_NVFP4, "flashinfer_trtllm", "NVFP4", _BLACKWELL, Status.REFUSED, _NVFP4_SCALES),
    Way(_NVFP4, "flashinfer_cutlass", "NVFP4", _BLACKWELL, Status.REFUSED, _NVFP4_SCALES),
    Way(
        _NVFP4,
        "flashinfer_cutedsl",
        "NVFP4",
        _BLACKWELL,
        Status.REFUSED,
        "it asserts that experts are divided by expert parallelism, and lays the block scales of all experts out in "
        "one tensor whose first dimension is not the expert",
    ),
)
_BY_KEY = {(way.method, way.backend): way for way in WAYS}


def way_of(method: str, backend: str | None) -> Way:
    """The way of a layer with these names; one that is not in the table is refused."""
    known = _BY_KEY.get((method, backend or ""))
    if known is not None:
        return known
    return Way(method, str(backend), "", (), Status.REFUSED, "it was not examined")


def is_verified(way: Way, gpu: str) -> bool:
    """Whether a way was compared with a single rank on a generation of GPUs, which so far is Hopper alone."""
    return way.status is Status.VERIFIED and gpu == "Hopper"


def check(layer_id: int, method: str, backend: str | None) -> Way:
    """The way of a layer, if it may be used.

    Raises:
        DwdpConfigError: it may not; the message has the reason and the ways that this format can take.
    """
    way = way_of(method, backend)
    if way.status is Status.REFUSED:
        others = [other.backend for other in WAYS if other.method == method and other.status is not Status.REFUSED]
        # The backend that this package adds is reached by FlashInfer's name.
        names = ["flashinfer_cutlass" if name == FLASHINFER_FP8 else name for name in others]
        advice = f"Use --moe-runner-backend {' or '.join(names)}" if names else "Use another quantization"
        raise DwdpConfigError(
            f"layer {layer_id}: {method} with MoE runner backend {backend} cannot read shared experts: {way.reason}. "
            f"{advice}, or serve without --enable-dwdp."
        )
    return way


@dataclass(frozen=True, slots=True)
class Default:
    """A backend that --moe-runner-backend auto may stand for.

    backend: the flag's value.  kernels: the format of FlashInfer's kernels that it needs (see `flashinfer_modules`).
    reason: why it comes at its place.
    """

    backend: str
    kernels: str | None
    reason: str


GPT_OSS_BF16 = "bf16 of gpt-oss"  # for which SGLang has a choice of its own

# By format, the best first, on Hopper, by the table in docs/kernels.md. A format that is not here is left to SGLang,
# whose choice for bf16 and block-FP8, Triton, is what the table says too.
DEFAULTS: Mapping[str, tuple[Default, ...]] = {
    GPT_OSS_BF16: (Default("triton", None, "SGLang's own choice, triton_kernel, cannot read shared experts"),),
    "MXFP4": (
        Default("flashinfer_mxfp4", "mxfp4", "SGLang's own choice, triton_kernel, cannot read shared experts"),
        Default(
            "triton",
            None,
            "SGLang's own choice, triton_kernel, cannot read shared experts, and FlashInfer's kernels are not built "
            "(python kernels/build.py --format mxfp4); experts take four times the memory, as bf16",
        ),
    ),
}


def default_for(weights: str, has_kernels: Callable[[str], bool]) -> Default | None:
    """What --moe-runner-backend auto stands for on Hopper; None: SGLang chooses.

    has_kernels: whether FlashInfer's kernels of a format are there.
    """
    ready = (one for one in DEFAULTS.get(weights, ()) if one.kernels is None or has_kernels(one.kernels))
    return next(ready, None)
