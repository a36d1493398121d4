"""Where exchange steps are possible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.srt_patches.exchange import why_alone

SHAPE = RowShape(8, 64, 8, torch.bfloat16)


def layer(*, experts: int = 16, hidden: int = 64, top_k: int = 8, backend: str = "triton") -> Any:
    fused = SimpleNamespace(hidden_size=hidden, top_k=top_k, runner_backend=SimpleNamespace(value=backend))
    return SimpleNamespace(placement=balanced(experts, 2), fused=fused)


def test_equal_layers_can_run_jointly() -> None:
    assert why_alone([layer(), layer()], 2, SHAPE, "cuda") is None
    assert why_alone([layer(backend="flashinfer_cutlass")], 2, SHAPE, "cpu") is None


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([layer(), layer(experts=12)], "differ in their numbers of experts"),
        ([layer(), layer(hidden=32)], "differ in their numbers of experts, or in their rows"),
        ([layer(), layer(top_k=4)], "or in their rows"),
        ([layer(), layer(backend="flashinfer_cutlass")], "validated with the MoE runner backend triton"),
        ([layer(experts=17)], "shares experts evenly"),
    ],
)
def test_others_decode_alone(layers: list[Any], why: str) -> None:
    answer = why_alone(layers, 2, SHAPE, "cuda")
    assert answer is not None
    assert why in answer
