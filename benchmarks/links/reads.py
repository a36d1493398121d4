"""Direct reads: a grouped product whose experts lie in the peers' memory, against the same on resident experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.links.device import Device, gathered, together
from benchmarks.links.layer import Shape, SharedLayer
from sglang_dwdp.memory.handshake import Exchange

TOKENS = (1, 8, 32, 128, 512, 2048)


def choose(tokens: int, top_k: int, experts: list[int], seed: int) -> torch.Tensor:
    """`[tokens, top_k]` int64: for each token different ones of `experts`, evenly."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, len(experts), generator=generator)
    return torch.tensor(experts)[scores.topk(min(top_k, len(experts)), dim=1).indices]


def grouped_product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`[rows, N]`: rows before `ends[e]` and not before `ends[e - 1]` times `weight[e]`.

    Args:
        rows: `[rows, K]` bf16.
        weight: `[experts, N, K]` bf16.
        ends: `[experts]` int32.
    """
    return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def measure(
    device: Device,
    exchange: Exchange,
    layer: SharedLayer,
    shape: Shape,
    save: Callable[[Any], None],
) -> dict[str, Any]:
    """All measurements; the same result on every rank, whose ranks call this together.

    Returns:
        `rows`: `tokens`, `bytes` of the distinct experts, and by rank `peers_s`, `resident_s` (all ranks at once), and
        `same`: whether both products are bitwise equal.
    """
    result: dict[str, Any] = {"rows": []}
    peers, resident = layer.direct["w13_weight"], layer.full["w13_weight"]
    shard = layer.placement.shard(layer.rank)
    remote = [expert for expert in range(shape.experts) if expert not in shard]
    for tokens in TOKENS:
        counts = choose(tokens, shape.top_k, remote, layer.rank).flatten().bincount(minlength=shape.experts)
        ends = counts.cumsum(0).int().to(device.device)
        rows = torch.randn(int(counts.sum()), shape.hidden, device=device.device).bfloat16()
        same = torch.equal(grouped_product(rows, peers, ends), grouped_product(rows, resident, ends))
        row: dict[str, Any] = {"tokens": tokens}
        for name, weight in (("peers_s", peers), ("resident_s", resident)):
            row[name] = together(exchange, partial(device.seconds, partial(grouped_product, rows, weight, ends)))
        expert_bytes = peers[0].numel() * peers.element_size()
        row |= {"bytes": gathered(exchange, int((counts > 0).sum()) * expert_bytes), "same": gathered(exchange, same)}
        result["rows"].append(row)
        save(result)
    return result
