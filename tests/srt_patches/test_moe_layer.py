"""What can be said of FusedMoE without a server: the rest is in tests/e2e."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.moe.utils import MoeRunnerBackend

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches.moe_layer import collect, refuse_unverified


class UnquantizedFusedMoEMethod:
    """Stands for SGLang's method of this name."""


class Fp8MoEMethod:
    """Stands for SGLang's method of this name."""


def layer(method: object, backend: MoeRunnerBackend | None) -> SimpleNamespace:
    return SimpleNamespace(layer_id=3, quant_method=method, runner_backend=backend)


def test_what_was_verified_on_gpus() -> None:
    refuse_unverified(layer(UnquantizedFusedMoEMethod(), MoeRunnerBackend.TRITON))


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        (Fp8MoEMethod(), MoeRunnerBackend.TRITON),
        (UnquantizedFusedMoEMethod(), MoeRunnerBackend.FLASHINFER_CUTLASS),
        (UnquantizedFusedMoEMethod(), None),
    ],
)
def test_what_was_not(method: object, backend: MoeRunnerBackend | None) -> None:
    with pytest.raises(DwdpConfigError, match=r"layer 3: .* has not been verified with DWDP on GPUs"):
        refuse_unverified(layer(method, backend))


def test_a_model_without_moe_layers() -> None:
    with pytest.raises(DwdpConfigError, match="Linear has no FusedMoE layer"):
        collect(torch.nn.Linear(2, 2), "cpu")
