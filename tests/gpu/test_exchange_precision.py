"""A joint layer with SGLang's Triton experts: how precise it is, and what its parts take. Two Hopper GPUs."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from sglang_dwdp.exchange.layer import run_joint, shard_table
from tests.fixtures import moe_problems as moe
from tests.fixtures.moe_problems import QWEN3_30B, Case
from tests.fixtures.sglang_kernels import published
from tests.gpu.test_exchange import COMPILED_S, EXPERTS, LAYERS, SHARDS, SIZE, Rank, _errors
from tests.unit.exchange.processes import answer, ranks

pytestmark = pytest.mark.gpus(2)

BUCKETS = (1, 8, 32, 64)


class Layer:
    """A layer of Qwen3-30B-A3B on one of two ranks, which knows the other's experts as well."""

    def __init__(self, me: Rank, weight_format: str) -> None:
        self.me, self.format = me, weight_format
        self.experts = moe.make(weight_format, QWEN3_30B)
        self.shards = [
            {name: part[shard.start : shard.stop] for name, part in self.experts.items()} for shard in SHARDS
        ]
        self.tables = [shard_table(EXPERTS, shard, "cuda", local=True) for shard in SHARDS]

    def partial(self, shard: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return moe.run_triton(self.format, Case(rows, ids, weights), self.shards[shard])

    def own(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.partial(self.me.rank, rows, ids, weights)

    def joint(self, case: Case, experts: Any = None) -> torch.Tensor:
        tensors = case.x, case.ids, case.weights
        return run_joint(self.me.inbox, LAYERS[0], len(case.x), *tensors, experts or self.own, self.me.table)

    def parallel(self, case: Case) -> torch.Tensor:
        """What an all-gather, these experts, and a reduce-scatter give, which is SGLang's expert parallelism."""
        # As many rows as there would be, since the kernel's tiles depend on it.
        rows, weights = torch.cat((case.x, case.x)), torch.cat((case.weights, case.weights))
        ids = torch.cat((case.ids, torch.full_like(case.ids, -1)))
        first, second = (self.partial(shard, rows, table[ids], weights) for shard, table in enumerate(self.tables))
        return (first + second)[: len(case.x)]

    def errors(self, case: Case) -> list[float]:
        """Of the joint layer, and of expert parallelism, against float64."""
        exact = moe.reference(self.format, case, self.experts)
        joint = self.joint(case)
        self.me.wait(30)
        return [moe.relative_error(one, exact) for one in (joint, self.parallel(case))]

    def times(self, case: Case) -> dict[str, float]:
        """Microseconds of the whole layer and of its parts."""
        received = self.me.inbox.dispatch(LAYERS[0], len(case.x), case.x, case.ids, case.weights)
        rows, ids, weights = received.rows.clone(), self.me.table[received.ids], received.weights.clone()
        self.me.inbox.combine(received.rows)
        self.me.wait(30)
        return {
            "dispatch and combine": self._us(lambda: self.joint(case, lambda rows, ids, weights: rows)),
            "experts": self._us(lambda: self.own(rows, ids, weights)),
            "layer": self._us(lambda: self.joint(case)),
        }

    def _us(self, run: Callable[[], torch.Tensor], calls: int = 10, replays: int = 5) -> float:
        """In a CUDA graph of some calls; ranks do this together."""
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        self.me.handshake.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.me.handshake.barrier()
        graph.replay()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        self.me.wait(30)
        end.synchronize()
        return round(start.elapsed_time(end) * 1000 / (calls * replays), 1)


def _measure(pipe: Connection, path: str, rank: int, name: str, weight_format: str) -> Any:
    with _errors(pipe), published():
        layer = Layer(Rank(path, rank, name), weight_format)
        cases = {bucket: moe.make_case(QWEN3_30B, bucket, seed=rank) for bucket in BUCKETS}
        errors = {bucket: layer.errors(case) for bucket, case in cases.items()}
        return errors, {bucket: layer.times(case) for bucket, case in cases.items()}


@pytest.mark.parametrize("weight_format", ["bf16", "fp8-block"])
def test_a_joint_layer_is_as_precise_as_expert_parallelism(weight_format: str) -> None:
    name = uuid.uuid4().hex
    with ranks(_measure, [(name, weight_format)] * SIZE) as started:
        for _, pipe in started:
            found = answer(pipe, COMPILED_S)
            assert not isinstance(found, str), found
            errors, times = found
            print(f"{weight_format}: errors, joint and expert parallelism: {errors}; us: {times}")  # noqa: T201
            for joint, parallel in errors.values():
                assert 0 < joint <= 1.01 * parallel
