"""A joint MoE layer, over all ranks' tensors at once: slow, plain, and what every transport is validated against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_dwdp.exchange.layer import Experts


def joint_layer(
    rows: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    experts: Sequence[Experts],
    shards: Sequence[range],
) -> list[torch.Tensor]:
    """What each rank's rows become.

    A row's partial sums are computed by the ranks that store one of its experts, each rounded to the rows' dtype when
    it travels; the owner adds them in rank order in float32, and rounds once.

    Args:
        rows: `[n_r, hidden_size]` of each rank r.
        ids: `[n_r, top_k]`, int32, of all experts; -1 for none.
        weights: `[n_r, top_k]`, float32.
        experts: Of each rank, with ids counted from its shard's start.
        shards: The experts that each rank stores.

    Returns:
        `[n_r, hidden_size]` of each rank, in the dtype of its rows.
    """
    results = []
    for own_rows, own_ids, own_weights in zip(rows, ids, weights, strict=True):
        total = torch.zeros_like(own_rows, dtype=torch.float32)
        for compute, shard in zip(experts, shards, strict=True):
            inside = (own_ids >= shard.start) & (own_ids < shard.stop)
            local = torch.where(inside, own_ids - shard.start, -1)
            for row in range(len(own_rows)):
                if inside[row].any():
                    one = slice(row, row + 1)
                    partial = compute(own_rows[one], local[one], own_weights[one])
                    total[one] += partial.to(own_rows.dtype).float()
        results.append(total.to(own_rows.dtype))
    return results
