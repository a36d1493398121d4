"""What is shared of a layer, and what is replicated."""

from __future__ import annotations

import torch

from sglang_dwdp.experts.layer import describe, tensors_of
from tests.fixtures.ranks import PlainLayer


def layer(**tails: tuple[int, ...]) -> PlainLayer:
    """One rank's shard of 256 experts over 8 ranks, without memory behind it."""
    full = {name: torch.empty(256, *tail, dtype=torch.float32, device="meta") for name, tail in tails.items()}
    return PlainLayer(3, full, 0, 8)


def test_r1s_block_scales_are_replicated_and_its_weights_shared() -> None:
    found = tensors_of(layer(w13_weight=(1,), scale_w13=(32, 56), scale_w2=(56, 16), bias=(8192,)), 0)
    assert {tensor.name: tensor.replicated for tensor in found} == {
        "w13_weight": False,  # a weight is shared however small it is
        "scale_w13": True,  # 1.75 MiB
        "scale_w2": True,
        "bias": False,  # 8 MiB
    }
    assert [tensor.expert_bytes for tensor in found] == [4, 4 * 32 * 56, 4 * 56 * 16, 4 * 8192]


def test_what_peers_must_agree_on() -> None:
    one = layer(w1=(8, 4))
    tensors = tensors_of(one, 0)
    same = describe(one, tensors, None, 4096)
    assert same == describe(one, tensors_of(layer(w1=(8, 4)), 0), None, 4096)
    assert same != describe(one, tensors_of(layer(w1=(4, 8)), 0), None, 4096)
    assert same != describe(one, tensors, 40, 4096)
    assert same != describe(one, tensors, None, 2 << 20)
