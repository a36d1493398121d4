"""The table of MoE backends."""

from __future__ import annotations

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.backends import (
    FLASHINFER_FP8,
    MOE_BACKENDS,
    Status,
    WeightFormat,
    check_backend,
    default_backend,
    find_backend,
    is_validated,
)


def test_every_backend_is_listed_once_and_has_a_reason_if_it_is_unsupported() -> None:
    assert len({(backend.weights, backend.name) for backend in MOE_BACKENDS}) == len(MOE_BACKENDS)
    for backend in MOE_BACKENDS:
        assert bool(backend.reason) == (backend.status is Status.UNSUPPORTED)
        assert set(backend.gpus) <= {"Hopper", "Blackwell"}
        assert backend.gpus


def test_what_is_not_listed_is_unsupported() -> None:
    assert find_backend("SomeNewMethod", "triton").status is Status.UNSUPPORTED
    with pytest.raises(DwdpConfigError, match=r"SomeNewMethod .* it was not examined\. Use another quantization"):
        check_backend(0, "SomeNewMethod", "triton")


def test_an_error_names_what_works_instead() -> None:
    with pytest.raises(
        DwdpConfigError, match=r"Use --moe-runner-backend flashinfer_mxfp4 or marlin or triton, or serve without"
    ):
        check_backend(2, "Mxfp4MoEMethod", "triton_kernel")


def test_flashinfer_for_block_fp8_is_asked_for_by_its_usual_name() -> None:
    assert check_backend(0, "Fp8MoEMethod", FLASHINFER_FP8).weights == "block-FP8"
    with pytest.raises(DwdpConfigError) as caught:
        check_backend(0, "Fp8MoEMethod", "cutlass")
    assert "flashinfer_cutlass" in str(caught.value)
    assert FLASHINFER_FP8 not in str(caught.value)


def test_what_was_validated_on_hopper_was_not_on_blackwell() -> None:
    backend = check_backend(0, "UnquantizedFusedMoEMethod", "triton")
    assert is_validated(backend, "Hopper")
    assert not is_validated(backend, "Blackwell")
    assert is_validated(check_backend(0, "Mxfp4MoEMethod", "triton"), "Hopper")
    assert not is_validated(check_backend(0, "UnquantizedFusedMoEMethod", "flashinfer_trtllm"), "Blackwell")


def test_nothing_on_blackwell_alone_is_called_validated() -> None:
    assert all(one.status is not Status.VALIDATED for one in MOE_BACKENDS if one.gpus == ("Blackwell",))


def test_a_default_without_its_kernels_is_passed_over() -> None:
    def default(weights: WeightFormat, *, gpt_oss: bool = False, kernels: bool = True) -> str | None:
        chosen = default_backend(weights, gpt_oss=gpt_oss, has_kernels=lambda _format: kernels)
        if chosen is None:
            return None
        backend = next(one for one in MOE_BACKENDS if (one.weights, one.name) == (weights, chosen[0]))
        assert backend.status is not Status.UNSUPPORTED
        assert "Hopper" in backend.gpus
        return chosen[0]

    assert default(WeightFormat.MXFP4) == "flashinfer_mxfp4"
    assert default(WeightFormat.MXFP4, kernels=False) == "triton"
    assert default(WeightFormat.BF16, gpt_oss=True) == "triton"
    assert default(WeightFormat.BF16) is None
    assert default(WeightFormat.BLOCK_FP8) is None
    assert default(WeightFormat.NVFP4) is None
