"""Staged forwards in CUDA graphs, piece by piece, with one stream much slower than the other; one GPU is enough."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.staged_layers import GraphSegment
from tests.fixtures.ranks import CUDA, PlainLayer, checkpoint, equal, forward, run_ranks, slow_copies

pytestmark = pytest.mark.gpu(2)
REPLAYS = 100


@pytest.mark.parametrize("slow", ["copy", "compute", "neither"])
@pytest.mark.parametrize("num_layers", [4, 5])
def test_replays_with_poisoned_slots(num_layers: int, slow: str) -> None:
    """No NaN of a released slot is ever seen, and no fill is late."""
    page = CUDA.memory().page_bytes
    full = checkpoint(num_layers, 8, {"w1": (32, page // 64)}, "cuda")  # an expert is one page
    sums = torch.stack([layer["w1"].float().sum() for layer in full])
    done = threading.Event()

    def replays(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        if slow == "copy":
            slow_copies(runtime)
        found = torch.zeros(num_layers, device="cuda")
        own = layers[0].placement.shard(runtime.rank)

        def run(index: int, layer: PlainLayer) -> None:
            runtime.wait(layer.layer_id)
            if slow == "compute":
                torch.cuda._sleep(200_000)
            weight = layer.tensors["w1"]
            found[index].copy_(weight.float().sum())
            weight[: own.start].fill_(float("nan"))
            weight[own.stop :].fill_(float("nan"))
            runtime.release(layer.layer_id)

        capturing = False
        graphs = []
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            with runtime.capture(1000, lambda: capturing):
                for index, layer in enumerate(layers):
                    run(index, layer)
                stream.synchronize()
                for index, layer in enumerate(layers):
                    graph = torch.cuda.CUDAGraph()
                    capturing = True
                    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                        run(index, layer)
                    capturing = False
                    graphs.append(runtime.staged.segment(graph))
            assert all(isinstance(graph, GraphSegment) for graph in graphs)
            seen = []
            for _ in range(REPLAYS):
                runtime.begin_forward(990)
                for graph in graphs:
                    graph.replay()
                runtime.end_forward(990, replayed=True)
                seen.append(found.clone())
            stream.synchronize()
            eager = equal(forward(runtime, layers, 1000), full)
            stream.synchronize()
        return torch.equal(torch.stack(seen), sums.expand(REPLAYS, -1)), eager, runtime.report()["late_fills"]

    def first_rank_only(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        if runtime.rank:  # it idles: two threads would take turns on the stream and hide a race
            done.wait(120)
            return None
        try:
            return replays(runtime, layers)
        finally:
            torch.cuda.synchronize()
            done.set()

    results = run_ranks(2, full, first_rank_only, DwdpConfig(view="staged", depth=2))
    assert results[0] == (True, True, 0), results
