"""The table of MoE backends."""

from __future__ import annotations

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.backends import DEFAULTS, FLASHINFER_FP8, WAYS, Status, check, default_for, is_verified, way_of
from sglang_dwdp.support.flashinfer_modules import FORMATS


def test_every_way_is_listed_once_and_every_refusal_has_a_reason() -> None:
    assert len({(way.method, way.backend) for way in WAYS}) == len(WAYS)
    for way in WAYS:
        assert bool(way.reason) == (way.status is Status.REFUSED)
        assert set(way.gpus) <= {"Hopper", "Blackwell"}
        assert way.gpus


def test_what_is_not_listed_is_refused() -> None:
    assert way_of("SomeNewMethod", "triton").status is Status.REFUSED
    with pytest.raises(DwdpConfigError, match=r"SomeNewMethod .* it was not examined\. Use another quantization"):
        check(0, "SomeNewMethod", "triton")


def test_a_refusal_names_what_works_instead() -> None:
    with pytest.raises(DwdpConfigError, match=r"Use --moe-runner-backend flashinfer_mxfp4 or triton, or serve without"):
        check(2, "Mxfp4MoEMethod", "triton_kernel")


def test_flashinfer_for_block_fp8_is_asked_for_by_its_usual_name() -> None:
    assert check(0, "Fp8MoEMethod", FLASHINFER_FP8).weights == "block-FP8"
    with pytest.raises(DwdpConfigError) as caught:
        check(0, "Fp8MoEMethod", "cutlass")
    assert "flashinfer_cutlass" in str(caught.value)
    assert FLASHINFER_FP8 not in str(caught.value)


def test_what_was_verified_on_hopper_is_not_on_blackwell() -> None:
    way = check(0, "UnquantizedFusedMoEMethod", "triton")
    assert is_verified(way, "Hopper")
    assert not is_verified(way, "Blackwell")
    assert is_verified(check(0, "Mxfp4MoEMethod", "triton"), "Hopper")
    assert not is_verified(check(0, "UnquantizedFusedMoEMethod", "flashinfer_trtllm"), "Blackwell")


def test_nothing_on_blackwell_alone_is_called_verified() -> None:
    assert all(way.status is not Status.VERIFIED for way in WAYS if way.gpus == ("Blackwell",))


def test_defaults_are_ways_that_work_and_end_with_one_that_needs_no_kernels() -> None:
    backends = {"flashinfer_cutlass" if way.backend == FLASHINFER_FP8 else way.backend: way for way in WAYS}
    for weights, choices in DEFAULTS.items():
        for choice in choices:
            stored = weights.removesuffix(" of gpt-oss")
            way = next(w for w in WAYS if w.weights == stored and w.backend in (choice.backend, FLASHINFER_FP8))
            assert way.status is not Status.REFUSED
            assert "Hopper" in way.gpus
            assert choice.backend in backends
            assert choice.kernels is None or choice.kernels in FORMATS
            assert choice.reason
        assert choices[-1].kernels is None


def test_a_default_without_its_kernels_is_passed_over() -> None:
    with_kernels = default_for("MXFP4", lambda _format: True)
    without = default_for("MXFP4", lambda _format: False)
    assert with_kernels is not None
    assert without is not None
    assert (with_kernels.backend, without.backend) == ("flashinfer_mxfp4", "triton")
    assert default_for("NVFP4", lambda _format: True) is None
