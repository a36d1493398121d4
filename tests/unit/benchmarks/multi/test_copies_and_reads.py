"""Parts a and b with ranks that are threads of the host: that they measure together, and check what they read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.multi import copies, grouped, reads
from benchmarks.multi.bench import HostBench
from benchmarks.multi.experts import WHOLE, Shape, SharedLayer
from benchmarks.multi.grouped import grouped_reference, route
from benchmarks.multi.ranks import run_part
from sglang_dwdp.memory.handshake import Exchange
from tests import ROOT

SHAPE = Shape(experts=13, hidden=64, intermediate=40, top_k=3)


def on_ranks(size: int, step: Callable[[HostBench, Exchange], Any]) -> list[Any]:
    name = uuid.uuid4().hex

    def one(rank: int) -> Any:
        exchange = Exchange(name, rank, size, 60.0)
        try:
            return step(HostBench(), exchange)
        finally:
            exchange.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("size", [2, 3])
def test_copies_of_every_case_and_rank(size: int) -> None:
    saved: list[int] = []

    def step(bench: HostBench, exchange: Exchange) -> dict[str, Any]:
        return copies.work(bench, exchange, SHAPE, lambda result: saved.append(len(result["rows"])), 0)

    results = on_ranks(size, step)
    assert all(json.dumps(result) == json.dumps(results[0]) for result in results)
    result = results[0]
    assert result["direct_is_right"]
    assert result["staged_is_right"]
    assert result["reference"] == []
    assert len(result["rows"]) == len(copies.cases(size)) == max(saved)
    for row in result["rows"]:
        readers = {reader for reader, _ in row["reads"]}
        for rank, figures in enumerate(row["by_rank"]):
            assert bool(figures) == (rank in readers)
        for figures in filter(None, row["by_rank"]):
            assert figures["bytes_per_s"] > 0
            under = row["slice_kib"] in (copies.WHOLE_KIB, copies.DEFAULT_KIB)
            assert ("product_slowdown" in figures) == ("bytes_per_s_under" in figures) == under


@pytest.mark.parametrize("size", [2, 4, 8])
def test_cases_have_every_pair_in_both_ways(size: int) -> None:
    found = copies.cases(size)
    pairs = size * (size - 1)
    for kib in (copies.WHOLE_KIB, copies.DEFAULT_KIB):
        of_size = [case for case in found if case.slice_kib == kib and case.engine == "default"]
        assert len({case.reads for case in of_size if case.kind == "one way"}) == pairs
        assert len({case.reads for case in of_size if case.kind == "both ways"}) == pairs // 2
        assert sum(case.kind == "all at once" for case in of_size) == (size > 2)
    assert {case.engine for case in found} == set(copies.ENGINES)
    assert len(found) < 250


def test_a_plan_from_one_source_is_its_part_of_the_whole_plan() -> None:
    def step(bench: HostBench, exchange: Exchange) -> bool:
        layer = SharedLayer(bench, exchange, SHAPE)
        whole = {read.data_ptr(): read.numel() for _, read in layer.plan(4096)}
        parts = [layer.plan(4096, source) for source in range(3)]
        same = whole == {read.data_ptr(): read.numel() for part in parts for _, read in part}
        same &= not parts[exchange.rank] and len(layer.plan(WHOLE)) < len(whole)
        exchange.barrier()
        layer.close()
        return same

    assert on_ranks(3, step) == [True] * 3


def test_a_fill_that_misses_bytes_is_seen() -> None:
    def step(bench: HostBench, exchange: Exchange) -> bool:
        layer = SharedLayer(bench, exchange, SHAPE)
        meter = copies.Meter(bench, exchange, layer)
        whole = layer.plan
        layer.plan = lambda *args: whole(*args)[1:]  # type: ignore[method-assign]
        # The plan poisons what it copies; what it leaves out still has to be seen, so poison that here.
        whole(WHOLE)[0][0].fill_(1)
        right = meter.plan_is_right(0, "default")
        exchange.barrier()
        meter.close()
        layer.close()
        return right

    assert on_ranks(2, step) == [False, False]


def test_reads_of_every_number_of_tokens() -> None:
    def step(bench: HostBench, exchange: Exchange) -> dict[str, Any]:
        return reads.work(bench, exchange, SHAPE, lambda _result: None, (1, 5, 40))

    results = on_ranks(3, step)
    assert json.dumps(results[0]) == json.dumps(results[2])
    assert results[0]["direct_is_right"]
    assert [row["tokens"] for row in results[0]["rows"]] == [1, 5, 40]
    for row in results[0]["rows"]:
        for mine in row["by_rank"]:
            assert mine["same"]
            assert 0 < mine["bytes"] <= mine["traffic"]
            assert mine["alone_s"].keys() == mine["together_s"].keys()
            assert min(*mine["alone_s"].values(), *mine["together_s"].values()) > 0


def test_tokens_choose_different_experts_evenly() -> None:
    chosen = reads.choose(3000, 3, [1, 4, 6, 7], 0)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    counts = [(chosen == expert).sum().item() for expert in (1, 4, 6, 7)]
    assert sum(counts) == 9000
    assert min(counts) > 2000


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_the_grouped_product_of_the_loop_is_that_of_each_pair(rows: int) -> None:
    x, weight = torch.randn(9, 8), torch.randn(5, 6, 8)
    chosen = reads.choose(9, 2, [0, 2, 3], 1)
    routed = route(chosen, rows)
    expected = torch.stack([weight[expert] @ x[token] for token in range(9) for expert in chosen[token]])
    assert torch.allclose(grouped_reference(x, weight, routed), expected, atol=1e-5)
    assert routed.experts <= 3
    assert routed.blocks >= routed.experts


def test_the_kernel_gives_what_the_loop_gives() -> None:
    """Triton's interpreter stands for the GPU, in a process of its own: it is chosen when kernels are defined."""
    code = """
import torch
from benchmarks.multi.ranks import run_part
from benchmarks.multi.grouped import grouped_reference, grouped_triton, route
from benchmarks.multi.reads import choose
for tokens, rows in ((1, 16), (20, 16), (70, 64), (150, 128)):
    x, weight = torch.randn(tokens, 128), torch.randn(6, 128, 128)
    routed = route(choose(tokens, 2, [1, 2, 5], tokens), rows)
    given = x, weight, routed
    torch.testing.assert_close(grouped_triton(*given), grouped_reference(*given), rtol=1e-4, atol=1e-3)
"""
    root = ROOT
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True, timeout=300)


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_the_kernel_compiles_for_hopper(rows: int) -> None:
    """Down to machine code, which needs no GPU: the interpreter lets pass what the compiler does not."""
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    columns, options = grouped.launch_options(rows)
    sizes = {"TOP_K": 8, "N": 1536, "K": 2048, "ROWS": rows, "COLUMNS": columns, "DEPTH": 64}
    types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "row_ids": "*i32", "expert_ids": "*i32", "pairs": "i32"}
    source = compiler.ASTSource(grouped._grouped, types | dict.fromkeys(sizes, "constexpr"), sizes)
    compiled = compiler.compile(source, target=target, options=options)
    assert ("wgmma" in compiled.asm["ptx"]) == (rows >= 64)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < 227 << 10


def test_a_part_that_fails_is_reported_with_its_log(tmp_path: Path) -> None:
    """Here by ranks that ask for a GPU that there is not."""
    script = ROOT / "benchmarks" / "multi_gpu.py"
    result = run_part("reads", 2, 64, script, tmp_path, 120)
    assert "failed" in result["error"]
    assert any("Error" in line for line in result["log"])
    assert not list(tmp_path.glob("*.json"))
