"""A MoE layer of a joint forward: rows go to the experts, partial sums come back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_dwdp.exchange.inbox import Inbox

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows `[n, hidden_size]`, ids `[n, top_k]` int32, weights `[n, top_k]` float32) -> `[n, hidden_size]`: for each row
the weighted sum over those of its experts whose id is not -1, zero if there are none."""


def keep_shard(ids: torch.Tensor, shard: range, *, local: bool) -> torch.Tensor:
    """Mask the experts of other ranks with -1, as expert parallelism does in SGLang.

    Args:
        ids: int32, any shape, of all experts of the model, or -1.
        shard: The experts that this rank stores (`Placement.shard`).
        local: Count the kept ones from the shard's start, for kernels that are given only the shard's slice of the
            weights; otherwise they keep their ids.

    Returns:
        int32, of the shape of `ids`.
    """
    kept = ids - shard.start if local else ids
    return torch.where((ids >= shard.start) & (ids < shard.stop), kept, -1)


def run_joint(
    inbox: Inbox,
    layer_id: int,
    bucket: int,
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    shard: range,
    *,
    local: bool = True,
) -> torch.Tensor:
    """One MoE layer of a joint forward; all ranks of the group call this for the same layer.

    Args:
        inbox: What rows travel by.
        layer_id: Names the layer in errors.
        bucket: Of the joint round.
        rows: `[n, hidden_size]`, this rank's own; n may be 0.
        ids: `[n, top_k]`, int32, of all experts of the model; -1 in rows of padding.
        weights: `[n, top_k]`, float32.
        experts: Computes partial sums with the experts that this rank stores.
        shard: Those experts.
        local: Whether `experts` wants ids counted from the shard's start.

    Returns:
        `[n, hidden_size]`.

    Raises:
        DwdpRuntimeError: A peer took no part; see `Inbox.dispatch`.
    """
    received = inbox.dispatch(layer_id, bucket, rows, ids, weights)
    partial = experts(received.rows, keep_shard(received.ids, shard, local=local), received.weights)
    return inbox.combine(partial)
