"""Copies and reads between ranks that are threads, on host memory: what is measured, and that bytes are checked."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_links import SMALL, table, work
from benchmarks.links import copies, reads
from benchmarks.links.device import Device
from benchmarks.links.layer import SharedLayer
from sglang_dwdp.memory.handshake import Exchange

RANKS = 3


def on_ranks(call: Callable[[Exchange], Any]) -> list[Any]:
    name = uuid.uuid4().hex

    def rank(index: int) -> Any:
        exchange = Exchange(name, index, RANKS, 60.0)
        try:
            return call(exchange)
        finally:
            exchange.close()

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(rank, range(RANKS)))


def test_all_ranks_measure_the_same_rows(tmp_path: Path) -> None:
    results = on_ranks(lambda exchange: work(Device(None), exchange, SMALL, tmp_path / "out.json"))
    for result in results:
        assert result["direct_is_right"]
        assert result["copies"]["staged_is_right"]
        rows = result["copies"]["rows"]
        assert [(row["reads"], row["slice_mib"]) for row in rows] == list(copies.cases(RANKS))
        one_way = rows[0]["bytes_per_s"]
        assert [rate is not None for rate in one_way] == [True, False, False]
        assert all(rate > 0 for rate in rows[-1]["bytes_per_s"] + rows[-1]["under_product"])
        assert [row["tokens"] for row in result["reads"]["rows"]] == list(reads.TOKENS)
        assert all(all(row["same"]) for row in result["reads"]["rows"])
    text = table(results[0])
    assert "| 0 ← 1, 1 ← 0 | 32 MiB |" in text
    assert "| all ← all peers | uncut |" in text
    assert "direct True, staged True" in text


def test_a_copy_that_is_left_out_is_noticed() -> None:
    def run(exchange: Exchange) -> tuple[bool, bool]:
        layer = SharedLayer(Device(None), exchange, SMALL)
        plan = layer.plan(1 << 20)

        def fill(skipped: int) -> None:
            for to, source in plan[skipped:]:
                to.copy_(source)

        found = layer.staged_after(plan, lambda: fill(0)), layer.staged_after(plan, lambda: fill(1))
        exchange.barrier()
        layer.close()
        return found

    assert on_ranks(run) == [(True, False)] * RANKS


def test_grouped_product_is_that_of_each_expert() -> None:
    rows, weight = torch.randn(6, 64).bfloat16(), torch.randn(3, 32, 64).bfloat16()
    found = reads.grouped_product(rows, weight, torch.tensor([2, 2, 6], dtype=torch.int32))
    expected = torch.cat([rows[:2] @ weight[0].T, rows[2:] @ weight[2].T])
    assert torch.allclose(found, expected, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("tokens", [1, 50])
def test_choice_is_of_different_experts(tokens: int) -> None:
    chosen = reads.choose(tokens, 2, [3, 5, 9], seed=1)
    assert chosen.shape == (tokens, 2)
    assert set(chosen.flatten().tolist()) <= {3, 5, 9}
    assert (chosen[:, 0] != chosen[:, 1]).all()
