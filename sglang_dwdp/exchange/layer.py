"""A MoE layer of a joint forward: rows go to the experts, partial sums come back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_dwdp.exchange.inbox import Inbox

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows `[n, hidden_size]`, ids `[n, top_k]` int32, weights `[n, top_k]` float32) -> `[n, hidden_size]`: for each row
the weighted sum over those of its experts whose id is not -1, zero if there are none."""


def shard_table(num_experts: int, shard: range, device: torch.device | str, *, local: bool) -> torch.Tensor:
    """What masks the experts of other ranks with -1, as expert parallelism does in SGLang.

    Args:
        num_experts: Of the layer.
        shard: The experts that this rank stores (`Placement.shard`).
        device: Of the ids.
        local: Count the kept ones from the shard's start, for kernels that are given only the shard's slice of the
            weights; otherwise they keep their ids.

    Returns:
        int32 `[num_experts + 1]`. Indexing it with ids, in one kernel, masks them: its last element is -1, so that
        the id -1 stays.
    """
    table = torch.full((num_experts + 1,), -1, dtype=torch.int32, device=device)
    first = 0 if local else shard.start
    table[shard.start : shard.stop] = torch.arange(first, first + len(shard), dtype=torch.int32, device=device)
    return table


def run_joint(
    inbox: Inbox,
    layer_id: int,
    bucket: int,
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    table: torch.Tensor,
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
        table: `shard_table` of those experts.

    Returns:
        `[n, hidden_size]`.

    Raises:
        DwdpRuntimeError: A peer took no part; see `Inbox.dispatch`.
    """
    received = inbox.dispatch(layer_id, bucket, rows, ids, weights)
    return inbox.combine(experts(received.rows, table[received.ids], received.weights))
