"""What each weight format needs of FlashInfer's fused MoE. Pure: names and patterns, nothing is read or run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_dwdp.errors import DwdpError

ARCHITECTURES = ("9.0a",)
_INSTANTIATION = "cutlass_fused_moe_instantiation.cu"
_GEMM = "moe_gemm_kernels_"
_BLOCK_SCALE = "fp8_blockscale_gemm.cu"
_GENERATED = ".generated.cu"

# What may be missing in a slim module: the runners and launchers of other formats. Anything else that is missing
# belongs to what all formats share, and leaving it out would be a mistake of this table.
_REPLACEABLE = re.compile(
    r"(CutlassMoeFCRunner|MoeGemmRunner|CutlassFp8BlockScaleGemmRunner"
    r"|sm80_generic_fused_moe_gemm_kernelLauncher|sm90_generic_mixed_moe_(gemm|small_k)_kernelLauncher"
    r"|tma_warp_specialized_generic_moe_gemm_kernelLauncher\w*)<"
)


@dataclass(frozen=True, slots=True)
class KernelFormat:
    """One weight format.

    runners: template arguments of `CutlassMoeFCRunner`, one string for each that is instantiated.
    gemms: the hand-written sources of its matrix products, by their activation and weight types.
    generated: matches the text of a generated source that the format needs; None: it needs none.
    block_scale: whether it needs the block-scaled FP8 product, which compiles kernels at run time.
    weight_dtypes: torch's names of the dtypes that FlashInfer's `init` gets for the weights.
    """

    name: str
    runners: tuple[str, ...]
    gemms: tuple[str, ...]
    generated: re.Pattern[str] | None
    block_scale: bool
    weight_dtypes: tuple[str, ...]

    def module_name(self, architecture: str) -> str:
        """The name of its module, unlike any of FlashInfer's."""
        return f"fused_moe_{_number(architecture)}_dwdp_{self.name.replace('-', '_')}"

    def needs(self, source: Path) -> bool:
        """Whether a source of FlashInfer's full module is compiled, as it is, for this format."""
        if source.name == _INSTANTIATION:
            return False
        if source.name.endswith(_GENERATED):
            return self.generated is not None and self.generated.search(source.read_text()) is not None
        if source.name.startswith(_GEMM):
            return source.name.removeprefix(_GEMM).removesuffix(".cu") in self.gemms
        if source.name == _BLOCK_SCALE:
            return self.block_scale
        return True

    def unexpected(self, missing: Iterable[str]) -> list[str]:
        """Those of the missing symbols (demangled) that are not another format's."""
        return [symbol for symbol in missing if not _REPLACEABLE.search(symbol) or self._is_own(symbol)]

    def _is_own(self, symbol: str) -> bool:
        return any(
            re.search(rf"(CutlassMoeFCRunner|MoeGemmRunner)<{re.escape(runner)}[,>]", symbol)
            for runner in self._mangled_runners()
        )

    def _mangled_runners(self) -> list[str]:
        """The runners' first two template arguments as a demangler writes them."""
        return [", ".join(_DEMANGLED.get(part, part) for part in runner.split(", ")[:2]) for runner in self.runners]


_DEMANGLED = {"Fp4Type": "cutlass::float_e2m1_t"}

FORMATS: dict[str, KernelFormat] = {
    spec.name: spec
    for spec in (
        KernelFormat(
            "bf16",
            ("__nv_bfloat16, __nv_bfloat16",),
            ("bf16_bf16",),
            re.compile(
                r"INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM\(Sm90, __nv_bfloat16, __nv_bfloat16,"
                r"|sm80_generic_fused_moe_gemm_kernelLauncher<cutlass::bfloat16_t,"
            ),
            block_scale=False,
            weight_dtypes=("bfloat16",),
        ),
        KernelFormat(
            "fp8-block",
            ("__nv_bfloat16, __nv_fp8_e4m3",),
            ("bf16_fp8",),
            None,
            block_scale=True,
            weight_dtypes=("float8_e4m3fn",),
        ),
        KernelFormat(
            "mxfp4",
            ("__nv_bfloat16, Fp4Type",),
            ("bf16_fp4",),
            re.compile(r"sm90_generic_mixed_moe_gemm_kernelLauncher<\s*__nv_bfloat16, SafeFP4,"),
            block_scale=False,
            weight_dtypes=("uint8",),
        ),
    )
}


def _number(architecture: str) -> str:
    return architecture.replace(".", "").rstrip("a")


def check_architecture(architecture: str) -> None:
    """
    Raises:
        DwdpError: there is no slim build for this architecture.
    """
    if architecture not in ARCHITECTURES:
        raise DwdpError(
            f"--arch {architecture}: slim kernels exist for {', '.join(ARCHITECTURES)} (Hopper) only. On other GPUs "
            "FlashInfer builds its own module when it is first used, or install flashinfer-jit-cache."
        )


def instantiation(template: str, spec: KernelFormat) -> str:
    """The source that instantiates the runners of a format, from `kernels/slim_instantiation.cu.in`."""
    lines = [f"template class CutlassMoeFCRunner<{runner}>;" for runner in spec.runners]
    return template.replace("@RUNNERS@", "\n".join(lines))


def stand_ins(template: str, spec: KernelFormat, symbols: Sequence[str]) -> str:
    """The source that defines the missing symbols (mangled), from `kernels/missing_kernels.cpp.in`."""
    target = '__attribute__((alias("sglang_dwdp_missing_kernel")))'
    lines = [f'void missing_{i}() __asm__("{symbol}") {target};' for i, symbol in enumerate(symbols)]
    return template.replace("@FORMAT@", spec.name).replace("@ALIASES@", "\n".join(lines))
