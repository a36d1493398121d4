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
    FP8 = "FP8"  # a scale for each matrix, or for each of its rows
    INTEGER = "int4/int8"  # with 16-bit activations: GPTQ, AWQ, compressed-tensors' pack-quantized
    MXFP4 = "MXFP4"
    NVFP4 = "NVFP4"


class Status(Enum):
    """How far a backend may be trusted."""

    VALIDATED = "validated"  # against a single rank, see docs/support.md
    UNVALIDATED = "unvalidated"  # it fits by reading SGLang's code
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class MoeBackend:
    """One backend for one weight format.

    Attributes:
        weights: the format; None if the backend is not listed.
        name: the value of the layer's runner backend.
        status: whether it may be used.
        gpus: generations that SGLang has it for.
        reason: why it is unsupported.
    """

    weights: WeightFormat | None
    name: str
    status: Status
    gpus: tuple[str, ...] = ()
    reason: str = ""


HOPPER, BLACKWELL = "Hopper", "Blackwell"
_BOTH, _HOPPER, _BLACKWELL = (HOPPER, BLACKWELL), (HOPPER,), (BLACKWELL,)
_BF16, _FP8, _FP8_SCALAR, _INTEGER, _MXFP4, _NVFP4 = WeightFormat
_VALIDATED, _UNVALIDATED, _UNSUPPORTED = Status
_FORMATS: Mapping[str, WeightFormat] = {  # by SGLang's class
    "UnquantizedFusedMoEMethod": _BF16,
    "Fp8MoEMethod": _FP8,
    "CompressedTensorsW8A8Fp8MoE": _FP8,
    "ModelOptFp8MoEMethod": _FP8_SCALAR,
    "W8A8FP8MoEMethod": _FP8_SCALAR,
    "GPTQMarlinMoEScheme": _INTEGER,
    "AWQMoEScheme": _INTEGER,
    "CompressedTensorsWNA16MoE": _INTEGER,
    "CompressedTensorsWNA16TritonMoE": _INTEGER,
    "Mxfp4MoEMethod": _MXFP4,
    "ModelOptNvFp4FusedMoEMethod": _NVFP4,
    "CompressedTensorsW4A16Nvfp4MoE": _NVFP4,
}
_TRITON_KERNEL = "its own routing and weight layout were not examined"
_CUTLASS = "it makes its tables of pointers and strides for the experts that a rank loads, before they are shared"
_HPC_OPS = "the padded scales that it keeps beside the checkpoint's were not examined"
_MXFP4_TRITON_KERNEL = "it swizzles all experts' weights and scales together into objects of its own"
_CUTEDSL = (
    "it asserts that experts are divided by expert parallelism, and lays their block scales out in one tensor whose "
    "first dimension is not the expert"
)
MOE_BACKENDS = (
    MoeBackend(_BF16, "triton", _VALIDATED, _BOTH),
    MoeBackend(_BF16, "flashinfer_cutlass", _VALIDATED, _BOTH),
    MoeBackend(_BF16, "deep_gemm", _VALIDATED, _BOTH),
    MoeBackend(_BF16, "flashinfer_trtllm", _UNVALIDATED, _BLACKWELL),
    MoeBackend(_BF16, "flashinfer_trtllm_routed", _UNVALIDATED, _BLACKWELL),
    MoeBackend(_BF16, "triton_kernel", _UNSUPPORTED, _BOTH, _TRITON_KERNEL),
    MoeBackend(_FP8, "triton", _VALIDATED, _BOTH),
    MoeBackend(_FP8, "deep_gemm", _VALIDATED, _BOTH),
    MoeBackend(_FP8, FLASHINFER_FP8, _VALIDATED, _HOPPER),
    MoeBackend(_FP8, "flashinfer_trtllm", _UNVALIDATED, _BLACKWELL),
    MoeBackend(_FP8, "flashinfer_trtllm_routed", _UNVALIDATED, _BLACKWELL),
    MoeBackend(_FP8, "cutlass", _UNSUPPORTED, _BOTH, _CUTLASS),
    MoeBackend(_FP8, "hpc_ops", _UNSUPPORTED, _HOPPER, _HPC_OPS),
    MoeBackend(_FP8_SCALAR, "triton", _VALIDATED, _BOTH),
    MoeBackend(_INTEGER, "marlin", _VALIDATED, _BOTH),
    MoeBackend(_INTEGER, "triton", _VALIDATED, _BOTH),
    MoeBackend(_MXFP4, "flashinfer_mxfp4", _VALIDATED, _BOTH),
    MoeBackend(_MXFP4, "triton_kernel", _UNSUPPORTED, _BOTH, _MXFP4_TRITON_KERNEL),
    MoeBackend(_MXFP4, "marlin", _VALIDATED, _BOTH),
    MoeBackend(_MXFP4, "triton", _VALIDATED, _BOTH),  # SGLang turns the weights into bf16, four times the size
    MoeBackend(_NVFP4, "marlin", _VALIDATED, _HOPPER),
    MoeBackend(_NVFP4, "flashinfer_trtllm", _UNVALIDATED, _BLACKWELL),
    MoeBackend(_NVFP4, "flashinfer_trtllm_routed", _UNVALIDATED, _BLACKWELL),
    MoeBackend(_NVFP4, "flashinfer_cutlass", _UNVALIDATED, _BLACKWELL),
    MoeBackend(_NVFP4, "flashinfer_cutedsl", _UNSUPPORTED, _BLACKWELL, _CUTEDSL),
)


def format_of(method: str, *, in_blocks: bool = True) -> WeightFormat | None:
    """The weight format of a layer; None if it is not listed.

    Args:
        method: SGLang's class for the format.
        in_blocks: whether FP8 weights have a scale for each block.
    """
    weights = _FORMATS.get(method)
    return _FP8_SCALAR if weights is _FP8 and not in_blocks else weights


def find_backend(method: str, name: str | None, *, in_blocks: bool = True) -> MoeBackend:
    """The backend of a layer with these names (see `format_of`); unsupported if it is not in the table."""
    key = format_of(method, in_blocks=in_blocks), name
    unknown = MoeBackend(None, str(name), _UNSUPPORTED, reason="it was not examined")
    return next((one for one in MOE_BACKENDS if (one.weights, one.name) == key), unknown)


def is_validated(backend: MoeBackend, gpu: str) -> bool:
    """Whether a backend was validated on a generation of GPUs, which so far is Hopper alone."""
    return backend.status is Status.VALIDATED and gpu == HOPPER


def check_backend(layer_id: int, method: str, name: str | None, *, in_blocks: bool = True) -> MoeBackend:
    """The backend of a layer, if it may be used.

    Args:
        layer_id: its number in the model.
        method: as in `format_of`.
        name: the value of the layer's runner backend.
        in_blocks: as in `format_of`.

    Raises:
        DwdpConfigError: it is unsupported; the message has the reason and the backends that this format can take.
    """
    backend = find_backend(method, name, in_blocks=in_blocks)
    if backend.status is Status.UNSUPPORTED:
        weights = format_of(method, in_blocks=in_blocks)
        others = [o.name for o in MOE_BACKENDS if o.weights is weights and o.status is not Status.UNSUPPORTED]
        # The runner that this package adds is asked for by FlashInfer's name.
        names = ["flashinfer_cutlass" if other == FLASHINFER_FP8 else other for other in others]
        advice = f"Use --moe-runner-backend {' or '.join(names)}" if names else "Use another quantization"
        raise DwdpConfigError(
            f"layer {layer_id}: {method} with MoE runner backend {name} cannot read shared experts: {backend.reason}. "
            f"{advice}, or serve without --enable-dwdp."
        )
    return backend


_INSTEAD = "SGLang's own choice, triton_kernel, cannot read shared experts"
_NOT_BUILT = (
    f"{_INSTEAD}, and FlashInfer's kernels are not built (python kernels/build.py --format mxfp4); experts take four "
    "times the memory, as bf16"
)


def default_backend(
    weights: WeightFormat, *, gpt_oss: bool, has_kernels: Callable[[str], bool]
) -> tuple[str, str] | None:
    """What --moe-runner-backend auto stands for on Hopper, and why; None: SGLang chooses.

    SGLang's choice for bf16 and block-FP8, Triton, is the best one too.

    Args:
        weights: format of the experts.
        gpt_oss: whether the model is gpt-oss, for which SGLang has a choice of its own.
        has_kernels: whether FlashInfer's kernels of a format, as `flashinfer_modules` names it, are there.
    """
    if weights is WeightFormat.MXFP4:
        return ("flashinfer_mxfp4", _INSTEAD) if has_kernels("mxfp4") else ("triton", _NOT_BUILT)
    return ("triton", _INSTEAD) if weights is WeightFormat.BF16 and gpt_oss else None
