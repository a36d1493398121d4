"""Which MoE backends can read shared experts, and which one a GPU gets by default. Pure.

A backend is listed by SGLang's class for the weight format and the MoE runner that a layer ended up with. One that is
not listed was not examined, and is unsupported: it may have sized something by the experts that a rank loaded, which
gives wrong tokens and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum

from sglang_dwdp.errors import DwdpConfigError

FLASHINFER_FP8 = "dwdp_flashinfer_fp8"
"""The runner that this package adds: block-FP8 through FlashInfer (see `block_fp8`)."""


class WeightFormat(StrEnum):
    """What experts are stored as."""

    BF16 = "bf16"
    BLOCK_FP8 = "block-FP8"
    MXFP4 = "MXFP4"
    NVFP4 = "NVFP4"


class Status(Enum):
    """VALIDATED: against a single rank, see docs/support.md.  UNVALIDATED: fits by reading SGLang's code."""

    VALIDATED = "validated"
    UNVALIDATED = "unvalidated"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class MoeBackend:
    """One backend for one weight format.

    Attributes:
        method: SGLang's class for the format.
        name: the value of the layer's runner backend.
        weights: the format; None if the backend is not listed.
        gpus: generations that SGLang has it for.
        status: whether it may be used.
        reason: why it is unsupported.
    """

    method: str
    name: str
    weights: WeightFormat | None
    gpus: tuple[str, ...]
    status: Status
    reason: str = ""


HOPPER, BLACKWELL = "Hopper", "Blackwell"
_BOTH = (HOPPER, BLACKWELL)
_METHODS: Mapping[WeightFormat, str] = {
    WeightFormat.BF16: "UnquantizedFusedMoEMethod",
    WeightFormat.BLOCK_FP8: "Fp8MoEMethod",
    WeightFormat.MXFP4: "Mxfp4MoEMethod",
    WeightFormat.NVFP4: "ModelOptNvFp4FusedMoEMethod",
}
_NVFP4_SCALES = (
    "SGLang takes a rank's part of the checkpoint's input scales by its place in expert parallelism, so every rank "
    "would get those of the first experts"
)


def _validated(weights: WeightFormat, name: str, *gpus: str) -> MoeBackend:
    return MoeBackend(_METHODS[weights], name, weights, gpus, Status.VALIDATED)


def _unvalidated(weights: WeightFormat, name: str, *gpus: str) -> MoeBackend:
    return MoeBackend(_METHODS[weights], name, weights, gpus, Status.UNVALIDATED)


def _unsupported(weights: WeightFormat, name: str, *gpus: str, reason: str) -> MoeBackend:
    return MoeBackend(_METHODS[weights], name, weights, gpus, Status.UNSUPPORTED, reason)


MOE_BACKENDS = (
    _validated(WeightFormat.BF16, "triton", *_BOTH),
    _validated(WeightFormat.BF16, "flashinfer_cutlass", *_BOTH),
    _validated(WeightFormat.BF16, "deep_gemm", *_BOTH),
    _unvalidated(WeightFormat.BF16, "flashinfer_trtllm", BLACKWELL),
    _unvalidated(WeightFormat.BF16, "flashinfer_trtllm_routed", BLACKWELL),
    _unsupported(
        WeightFormat.BF16, "triton_kernel", *_BOTH, reason="its own routing and weight layout were not examined"
    ),
    _validated(WeightFormat.BLOCK_FP8, "triton", *_BOTH),
    _validated(WeightFormat.BLOCK_FP8, "deep_gemm", *_BOTH),
    _validated(WeightFormat.BLOCK_FP8, FLASHINFER_FP8, HOPPER),
    _unvalidated(WeightFormat.BLOCK_FP8, "flashinfer_trtllm", BLACKWELL),
    _unvalidated(WeightFormat.BLOCK_FP8, "flashinfer_trtllm_routed", BLACKWELL),
    _unsupported(
        WeightFormat.BLOCK_FP8,
        "cutlass",
        *_BOTH,
        reason="it makes its tables of pointers and strides for the experts that a rank loads, before they are shared",
    ),
    _unsupported(
        WeightFormat.BLOCK_FP8,
        "hpc_ops",
        HOPPER,
        reason="the padded scales that it keeps beside the checkpoint's were not examined",
    ),
    _validated(WeightFormat.MXFP4, "flashinfer_mxfp4", *_BOTH),
    _unsupported(
        WeightFormat.MXFP4,
        "triton_kernel",
        *_BOTH,
        reason="it swizzles all experts' weights and scales together into objects of its own",
    ),
    _validated(WeightFormat.MXFP4, "triton", *_BOTH),  # SGLang turns the weights into bf16, four times the size
    _unsupported(WeightFormat.NVFP4, "flashinfer_trtllm", BLACKWELL, reason=_NVFP4_SCALES),
    _unsupported(WeightFormat.NVFP4, "flashinfer_cutlass", BLACKWELL, reason=_NVFP4_SCALES),
    _unsupported(
        WeightFormat.NVFP4,
        "flashinfer_cutedsl",
        BLACKWELL,
        reason="it asserts that experts are divided by expert parallelism, and lays the block scales of all experts "
        "out in one tensor whose first dimension is not the expert",
    ),
)
_BY_KEY = {(backend.method, backend.name): backend for backend in MOE_BACKENDS}


def find_backend(method: str, name: str | None) -> MoeBackend:
    """The backend of a layer with these names; unsupported if it is not in the table."""
    known = _BY_KEY.get((method, name or ""))
    if known is not None:
        return known
    return MoeBackend(method, str(name), None, (), Status.UNSUPPORTED, "it was not examined")


def is_validated(backend: MoeBackend, gpu: str) -> bool:
    """Whether a backend was validated on a generation of GPUs, which so far is Hopper alone."""
    return backend.status is Status.VALIDATED and gpu == HOPPER


def check_backend(layer_id: int, method: str, name: str | None) -> MoeBackend:
    """The backend of a layer, if it may be used.

    Raises:
        DwdpConfigError: it is unsupported; the message has the reason and the backends that this format can take.
    """
    backend = find_backend(method, name)
    if backend.status is Status.UNSUPPORTED:
        others = [o.name for o in MOE_BACKENDS if o.method == method and o.status is not Status.UNSUPPORTED]
        # The runner that this package adds is asked for by FlashInfer's name.
        names = ["flashinfer_cutlass" if other == FLASHINFER_FP8 else other for other in others]
        advice = f"Use --moe-runner-backend {' or '.join(names)}" if names else "Use another quantization"
        raise DwdpConfigError(
            f"layer {layer_id}: {method} with MoE runner backend {name} cannot read shared experts: {backend.reason}. "
            f"{advice}, or serve without --enable-dwdp."
        )
    return backend


@dataclass(frozen=True, slots=True)
class Default:
    """A backend that --moe-runner-backend auto may stand for.

    Attributes:
        backend: the flag's value.
        kernels: the format of FlashInfer's kernels that it needs, as `flashinfer_modules` names it; None: none.
        reason: why it comes at its place.
    """

    backend: str
    kernels: str | None
    reason: str


# What --moe-runner-backend auto stands for on Hopper, by format, the best first, by the table in docs/kernels.md. The
# entry of bf16 is for gpt-oss. Everything else is left to SGLang, whose choice for bf16 and block-FP8, Triton, is what
# the table says too.
DEFAULTS: Mapping[WeightFormat, tuple[Default, ...]] = {
    WeightFormat.BF16: (Default("triton", None, "SGLang's own choice, triton_kernel, cannot read shared experts"),),
    WeightFormat.MXFP4: (
        Default("flashinfer_mxfp4", "mxfp4", "SGLang's own choice, triton_kernel, cannot read shared experts"),
        Default(
            "triton",
            None,
            "SGLang's own choice, triton_kernel, cannot read shared experts, and FlashInfer's kernels are not built "
            "(python kernels/build.py --format mxfp4); experts take four times the memory, as bf16",
        ),
    ),
}


def default_backend(weights: WeightFormat, *, gpt_oss: bool, has_kernels: Callable[[str], bool]) -> Default | None:
    """What --moe-runner-backend auto stands for on Hopper; None: SGLang chooses.

    Args:
        weights: format of the experts.
        gpt_oss: whether the model is gpt-oss, for which SGLang has a choice of its own.
        has_kernels: whether FlashInfer's kernels of a format are there.
    """
    choices = () if weights is WeightFormat.BF16 and not gpt_oss else DEFAULTS.get(weights, ())
    return next((one for one in choices if one.kernels is None or has_kernels(one.kernels)), None)
