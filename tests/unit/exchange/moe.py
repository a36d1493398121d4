"""A small MoE layer in torch, whose result for a row does not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_dwdp.exchange.layer import Experts


@dataclass(frozen=True)
class Weights:
    """`[experts, 2 * intermediate, hidden]` and `[experts, hidden, intermediate]`."""

    up: torch.Tensor
    down: torch.Tensor

    @staticmethod
    def random(experts: int, hidden: int, intermediate: int, dtype: torch.dtype = torch.bfloat16) -> Weights:
        generator = torch.Generator().manual_seed(experts)
        up = torch.randn(experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5
        down = torch.randn(experts, hidden, intermediate, generator=generator) / intermediate**0.5
        return Weights(up.to(dtype), down.to(dtype))

    def shard(self, shard: range) -> Weights:
        return Weights(self.up[shard.start : shard.stop], self.down[shard.start : shard.stop])

    def to(self, dtype: torch.dtype) -> Weights:
        return Weights(self.up.to(dtype), self.down.to(dtype))

    def experts(self) -> Experts:
        """Row by row, in the weights' precision, float32 at least."""
        work = torch.promote_types(self.up.dtype, torch.float32)
        up, down = self.up.to(work), self.down.to(work)

        def compute(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            result = torch.zeros(rows.shape, dtype=work)
            for row in range(len(rows)):
                for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
                    if expert >= 0:
                        gate, value = (up[expert] @ rows[row].to(work)).chunk(2)
                        result[row] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * value))
            return result.to(rows.dtype)

        return compute


def random_rows(
    counts: Sequence[int], hidden: int, top_k: int, experts: int, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Rows, ids and weights of each rank; a few ids are -1."""
    generator = torch.Generator().manual_seed(seed)
    rows, ids, weights = [], [], []
    for count in counts:
        rows.append(torch.randn(count, hidden, generator=generator).bfloat16())
        order = torch.rand(count, experts, generator=generator).argsort(dim=1)[:, :top_k].int()
        ids.append(torch.where(torch.rand(count, top_k, generator=generator) < 0.1, -1, order))
        weights.append(torch.rand(count, top_k, generator=generator))
    return rows, ids, weights
