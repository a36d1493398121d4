"""The order of rows within an expert."""

from __future__ import annotations

import pytest
import torch

from tests.fixtures.row_order import in_order

UNUSED = -12345  # what memory that nobody wrote may hold


def aligned(ids: torch.Tensor, block_size: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows of each expert padded to tiles, in random order: rows, the tiles' experts, how many are used."""
    rows: list[int] = []
    experts: list[int] = []
    for expert in range(-1, int(ids.max()) + 1):
        own = (ids == expert).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=draw)]
        tiles = -(-len(own) // block_size)
        rows += [*own.tolist(), *[len(ids)] * (tiles * block_size - len(own))]
        experts += [expert] * tiles
    return torch.tensor([*rows, *[UNUSED] * 7], dtype=torch.int32), torch.tensor([*experts, UNUSED]), len(rows)


@pytest.mark.parametrize("block_size", [8, 64])
def test_only_the_order_within_experts_changes(block_size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 14, (500,), generator=draw)
    found = []
    for _ in range(2):
        rows, experts, used = aligned(ids, block_size, draw)
        ordered = in_order(rows, experts, torch.tensor([used, 0]), block_size, len(ids))
        assert ordered.dtype == rows.dtype
        found.append(ordered[:used])
        for before, after, expert in zip(
            rows[:used].split(block_size), ordered[:used].split(block_size), experts[:-1].tolist(), strict=True
        ):
            assert len(before) == len(after)
            assert all(row == len(ids) or ids[row] == expert for row in after.tolist())
        for expert in range(-1, 14):
            tiles = torch.cat([t for t, e in zip(found[-1].split(block_size), experts, strict=False) if e == expert])
            assert tiles.tolist() == sorted((ids == expert).nonzero().flatten().tolist()) + [len(ids)] * int(
                (tiles == len(ids)).sum()
            )
    assert torch.equal(*found)
