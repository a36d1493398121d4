"""Which of FlashInfer's sources a format takes, and what it may leave out."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.support import flashinfer_modules
from tests.unit.kernels.script import script

FORMATS = script.FORMATS
TMA = "INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM(Sm90, {0}, {0}, {0},"
MIXED = "sm90_generic_mixed_moe_gemm_kernelLauncher<{0}, {1}, __nv_bfloat16,"
SM80 = "sm80_generic_fused_moe_gemm_kernelLauncher<cutlass::{0}, cutlass::{0}, 16, 128>"


@pytest.mark.parametrize(
    ("text", "taken_by"),
    [
        (TMA.format("__nv_bfloat16"), {"bf16"}),
        (TMA.format("half"), set()),
        (SM80.format("bfloat16_t"), {"bf16"}),
        (SM80.format("half_t"), set()),
        (MIXED.format("__nv_bfloat16", "SafeFP4"), {"mxfp4"}),
        (MIXED.format("__nv_fp8_e4m3", "SafeFP4"), set()),
        (MIXED.format("__nv_fp8_e4m3", "cutlass::uint4b_t"), set()),
    ],
)
def test_generated_sources(tmp_path: Path, text: str, taken_by: set[str]) -> None:
    source = tmp_path / "kernels.generated.cu"
    source.write_text(text)
    assert {name for name, kernels in FORMATS.items() if kernels.needs(source)} == taken_by


@pytest.mark.parametrize(
    ("name", "taken_by"),
    [
        ("moe_gemm_kernels_bf16_bf16.cu", {"bf16"}),
        ("moe_gemm_kernels_bf16_fp8.cu", {"fp8-block"}),
        ("moe_gemm_kernels_bf16_fp4.cu", {"mxfp4"}),
        ("moe_gemm_kernels_fp16_fp16.cu", set()),
        ("fp8_blockscale_gemm.cu", {"fp8-block"}),
        ("cutlass_fused_moe_instantiation.cu", set()),
        ("flashinfer_cutlass_fused_moe_binding.cu", set(FORMATS)),
        ("envUtils.cpp", set(FORMATS)),
    ],
)
def test_other_sources(name: str, taken_by: set[str]) -> None:
    assert {n for n, kernels in FORMATS.items() if kernels.needs(Path(name))} == taken_by


OTHER = "ns::CutlassMoeFCRunner<__half, __half, __half>::runMoe(void const*)"
OWN = {
    "bf16": "ns::MoeGemmRunner<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16>::moeGemm()",
    "fp8-block": "ns::CutlassMoeFCRunner<__nv_bfloat16, __nv_fp8_e4m3, __nv_bfloat16>::runMoe()",
    "mxfp4": "ns::MoeGemmRunner<__nv_bfloat16, cutlass::float_e2m1_t, __nv_bfloat16>::moeGemm()",
}


@pytest.mark.parametrize("name", FORMATS)
def test_only_other_formats_may_be_missing(name: str) -> None:
    shared = "ns::getEnvFlag(char const*)"
    assert FORMATS[name].unexpected([OTHER, shared, OWN[name]]) == [shared, OWN[name]]
    others = [symbol for format_name, symbol in OWN.items() if format_name != name]
    assert FORMATS[name].unexpected(others) == []


def test_the_formats_are_those_that_a_server_looks_for() -> None:
    assert set(FORMATS) == set(flashinfer_modules.FORMATS)
    names = {flashinfer_modules.module_name(name) for name in FORMATS}
    assert names == {"fused_moe_90_dwdp_bf16", "fused_moe_90_dwdp_fp8_block", "fused_moe_90_dwdp_mxfp4"}


def test_written_sources(tmp_path: Path) -> None:
    symbol = "_ZN12tensorrt_llm18CutlassMoeFCRunnerIffE3runEv"
    text = script.write_missing(tmp_path / "missing.cpp", "mxfp4", [symbol]).read_text()
    assert f'void missing_0() __asm__("{symbol}")' in text
    assert "for mxfp4 weights only" in text
    with pytest.raises(DwdpError, match="needs more for mxfp4"):
        script.write_missing(tmp_path / "missing.cpp", "mxfp4", ["_ZN12tensorrt_llm6helperEv"])
    instantiation = script.INSTANTIATION.format(runner=FORMATS["mxfp4"].runner)
    assert "template class CutlassMoeFCRunner<__nv_bfloat16, Fp4Type>;" in instantiation
