"""A grouped product of experts, as a MoE layer's first one: in Triton, and as a loop to compare it with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # on a machine without GPUs the loop is enough
    triton = None


@dataclass(frozen=True, slots=True)
class Routed:
    """Which expert multiplies which rows, in blocks of `rows` rows that have one expert each.

    pairs: number of (token, expert) pairs; pair p is of token p // top_k.
    row_ids: `[blocks * rows]` int32, the pair of each row; `pairs` where a block is not full.
    expert_ids: `[blocks]` int32.
    """

    pairs: int
    top_k: int
    rows: int
    row_ids: torch.Tensor
    expert_ids: torch.Tensor

    @property
    def blocks(self) -> int:
        return len(self.expert_ids)

    @property
    def experts(self) -> int:
        """Distinct experts."""
        return len(torch.unique(self.expert_ids))


def route(chosen: torch.Tensor, rows: int) -> Routed:
    """Blocks for the experts `chosen`, `[tokens, top_k]`, on the same device."""
    tokens, top_k = chosen.shape
    flat = chosen.reshape(-1).tolist()
    by_expert: dict[int, list[int]] = {}
    for pair, expert in enumerate(flat):
        by_expert.setdefault(expert, []).append(pair)
    row_ids: list[int] = []
    expert_ids: list[int] = []
    for expert in sorted(by_expert):
        mine = by_expert[expert]
        blocks = -(-len(mine) // rows)
        row_ids += [*mine, *[len(flat)] * (blocks * rows - len(mine))]
        expert_ids += [expert] * blocks
    where = chosen.device
    of_rows = torch.tensor(row_ids, dtype=torch.int32, device=where)
    return Routed(tokens * top_k, top_k, rows, of_rows, torch.tensor(expert_ids, dtype=torch.int32, device=where))


def block_rows(tokens: int, top_k: int, experts: int) -> int:
    """Rows of a block that fit `tokens` tokens spread over `experts` experts: 16, 64 or 128."""
    per_expert = tokens * top_k / experts
    return 16 if per_expert <= 16 else 64 if per_expert <= 64 else 128


def grouped_reference(x: torch.Tensor, weight: torch.Tensor, routed: Routed) -> torch.Tensor:
    """`[pairs, N]`: row p is `weight[expert of p] @ x[token of p]`.

    x: `[tokens, K]`.  weight: `[num_experts, N, K]`.
    """
    out = torch.empty(routed.pairs, weight.shape[1], dtype=x.dtype, device=x.device)
    for block, expert in enumerate(routed.expert_ids.tolist()):
        pairs = routed.row_ids[block * routed.rows : (block + 1) * routed.rows].long()
        pairs = pairs[pairs < routed.pairs]
        out[pairs] = x[pairs // routed.top_k] @ weight[expert].T
    return out


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _grouped(
        x: tl.tensor,
        weight: tl.tensor,
        out: tl.tensor,
        row_ids: tl.tensor,
        expert_ids: tl.tensor,
        pairs: tl.tensor,
        TOP_K: tl.constexpr,
        N: tl.constexpr,
        K: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
    ) -> None:
        block = tl.program_id(1)
        expert = tl.load(expert_ids + block).to(tl.int64)
        pair = tl.load(row_ids + block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        real = pair < pairs
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        x_at = x + (pair // TOP_K)[:, None] * K + depth[None, :]
        weight_at = weight + expert * (N * K) + column[None, :] * K + depth[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for _ in range(K // DEPTH):
            rows = tl.load(x_at, mask=real[:, None], other=0.0)
            total = tl.dot(rows, tl.load(weight_at), total)
            x_at += DEPTH
            weight_at += DEPTH
        out_at = out + pair[:, None] * N + column[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=real[:, None])


def launch_options(rows: int) -> tuple[int, dict[str, int]]:
    """Columns of a block of `rows` rows, and how it is compiled."""
    return (64 if rows == 16 else 128), {"num_warps": 4 if rows < 128 else 8, "num_stages": 4 if rows < 128 else 3}


def grouped_triton(x: torch.Tensor, weight: torch.Tensor, routed: Routed) -> torch.Tensor:
    """As `grouped_reference`, for N a multiple of 128 and K of 64. Sums in float32.

    Raises:
        ValueError: for other sizes.
    """
    _, n, k = weight.shape
    if n % 128 or k % 64:
        raise ValueError(f"the product's sizes must be multiples of 128 and 64, not {n} and {k}")
    out = torch.empty(routed.pairs, n, dtype=x.dtype, device=x.device)
    columns, options = launch_options(routed.rows)
    _grouped[(n // columns, routed.blocks)](
        x,
        weight,
        out,
        routed.row_ids,
        routed.expert_ids,
        routed.pairs,
        TOP_K=routed.top_k,
        N=n,
        K=k,
        ROWS=routed.rows,
        COLUMNS=columns,
        DEPTH=64,
        **options,
    )
    return out
