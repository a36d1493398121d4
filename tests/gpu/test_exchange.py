"""Joint layers between GPUs, one process for each, in CUDA graphs, against the reference.

FlashInfer compiles its kernels at first use, which takes a minute or more.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange.flashinfer_inbox import FlashInferInbox
from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.exchange.layer import Experts, run_joint, shard_table
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.memory.handshake import Exchange
from tests.fixtures.joint_layer import joint_layer
from tests.unit.exchange.processes import PATIENT, answer, open_meeting, ranks

pytestmark = pytest.mark.gpus(2)

HIDDEN, TOP_K, EXPERTS, SIZE = 2048, 8, 128, 2
SHAPE = RowShape(max_bucket=512, hidden_size=HIDDEN, top_k=TOP_K, dtype=torch.bfloat16)
LAYERS = [3, 4, 7]
PLACEMENT = balanced(EXPERTS, SIZE)
SHARDS = [PLACEMENT.shard(rank) for rank in range(SIZE)]
COMPILED_S = 500


def elementwise(shard: range, device: torch.device | str) -> Experts:
    """Experts that scale and shift, in single steps that round alike on every device and for every batch."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(EXPERTS, generator=generator)[shard.start : shard.stop].to(device)
    shift = torch.randn(EXPERTS, generator=generator)[shard.start : shard.stop].to(device)

    def compute(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(rows, dtype=torch.float32)
        for k in range(TOP_K):
            expert = ids[:, k].clamp_min(0).long()
            term = rows.float() * scale[expert][:, None]
            term = (term + shift[expert][:, None]) * weights[:, k : k + 1]
            result = result + torch.where(ids[:, k : k + 1] >= 0, term, 0.0)
        return result.to(rows.dtype)

    return compute


def inputs(bucket: int, counts: Sequence[int], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """Rows, ids and weights of all ranks, padded to the bucket: rows of padding are routed nowhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(bucket, HIDDEN, generator=generator).bfloat16() for _ in counts]
    weights = [torch.rand(bucket, TOP_K, generator=generator) for _ in counts]
    ids = [torch.rand(bucket, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K].int() for _ in counts]
    for own, count in zip(ids, counts, strict=True):
        own[count:] = -1
    return rows, ids, weights


def expected(bucket: int, counts: Sequence[int], seed: int) -> list[torch.Tensor]:
    """All layers, one after the other, on the CPU."""
    rows, ids, weights = inputs(bucket, counts, seed)
    computes = [elementwise(shard, "cpu") for shard in SHARDS]
    for _ in LAYERS:
        rows = joint_layer(rows, ids, weights, computes, SHARDS)
    return rows


class Rank:
    """A rank on the GPU of its number."""

    def __init__(self, path: str, rank: int, name: str) -> None:
        torch.cuda.set_device(rank)
        self.rank = rank
        self.page = open_meeting(path, rank, SIZE, PATIENT).page
        self.handshake = Exchange(name, rank, SIZE, COMPILED_S)
        self.handshake.connect()
        self.inbox = FlashInferInbox(self.handshake, EXPERTS, SHAPE, LAYERS, self.page.lost)
        self.compute = elementwise(SHARDS[rank], "cuda")
        self.table = shard_table(EXPERTS, SHARDS[rank], "cuda", local=True)

    def forward(self, bucket: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for layer in LAYERS:
            rows = run_joint(self.inbox, layer, bucket, rows, ids, weights, self.compute, self.table)
        return rows

    def capture(self, bucket: int, priority: int = 0) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        """A graph of all layers, its inputs, its result."""
        static = [each[self.rank].cuda() for each in inputs(bucket, [bucket] * SIZE, seed=0)]
        stream: Any = torch.cuda.Stream(priority=priority)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            self.forward(bucket, *static)
        torch.cuda.synchronize()
        self.handshake.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = self.forward(bucket, *static)
        self.handshake.barrier()
        return graph, static, result

    def wait(self, limit_s: float) -> None:
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self.inbox.wait(done, limit_s)


@contextmanager
def _errors(pipe: Connection) -> Any:
    try:
        yield
    except Exception as error:
        pipe.send(repr(error))
        raise


def _replays(pipe: Connection, path: str, rank: int, name: str) -> Any:
    with _errors(pipe):
        me = Rank(path, rank, name)
        results = []
        for bucket, counts in ((1, (1, 1)), (8, (3, 8)), (64, (64, 40)), (32, (0, 32)), (512, (512, 300))):
            graph, static, result = me.capture(bucket)
            for seed in range(1, 6):
                for target, source in zip(static, inputs(bucket, counts, seed), strict=True):
                    target.copy_(source[rank])
                result.fill_(torch.nan)
                graph.replay()
                me.wait(30)
                wanted = expected(bucket, counts, seed)[rank]
                results.append((bucket, counts, seed, torch.equal(result.cpu(), wanted)))
        # Eager, with as many rows as there are.
        for counts in ((2, 5), (0, 3), (8, 0)):
            rows, ids, weights = ([each[rank][: counts[rank]].cuda()] for each in inputs(8, counts, 9))
            result = me.forward(8, rows[0], ids[0], weights[0])
            me.wait(30)
            results.append((8, counts, 9, torch.equal(result.cpu(), expected(8, counts, 9)[rank][: counts[rank]])))
        me.handshake.barrier()
        me.inbox.close()
        return results


def test_graphs_give_what_the_reference_gives_bitwise() -> None:
    """Of two ranks, whose sum has one order: unequal rows, one idle rank, several buckets, new inputs each time."""
    name = uuid.uuid4().hex
    with ranks(_replays, [(name,)] * SIZE) as started:
        for _, pipe in started:
            results = answer(pipe, COMPILED_S)
            assert not isinstance(results, str), results
            assert [result for result in results if not result[-1]] == []
            assert len(results) == 28


def _many(pipe: Connection, path: str, rank: int, name: str) -> Any:
    with _errors(pipe):
        me = Rank(path, rank, name)
        graphs = {bucket: me.capture(bucket) for bucket in (1, 8, 32)}
        generator = torch.Generator().manual_seed(7)  # the same rounds on both ranks
        delays = torch.Generator().manual_seed(rank)
        wanted: dict[tuple[int, int], tuple[list[torch.Tensor], torch.Tensor]] = {}
        wrong = 0
        for _ in range(10_000):
            bucket = list(graphs)[int(torch.randint(len(graphs), (1,), generator=generator))]
            seed = int(torch.randint(1, 4, (1,), generator=generator))
            counts = (bucket, bucket // 2) if seed % 2 else (bucket // 2, bucket)
            if (bucket, seed) not in wanted:
                sent = [each[rank].cuda() for each in inputs(bucket, counts, seed)]
                wanted[bucket, seed] = sent, expected(bucket, counts, seed)[rank].cuda()
            graph, static, result = graphs[bucket]
            sent, right = wanted[bucket, seed]
            for target, source in zip(static, sent, strict=True):
                target.copy_(source)
            if torch.rand(1, generator=delays) < 0.1:
                time.sleep(float(torch.rand(1, generator=delays)) * 2e-3)
            graph.replay()
            me.wait(30)
            wrong += not torch.equal(result, right)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        times = {}
        for bucket, (graph, _, _) in graphs.items():
            me.handshake.barrier()
            start.record()
            for _ in range(20):
                graph.replay()
            end.record()
            end.synchronize()
            times[bucket] = round(start.elapsed_time(end) * 1000 / 20 / len(LAYERS), 1)
        return wrong, times


def test_ten_thousand_rounds_with_random_delays_and_buckets() -> None:
    name = uuid.uuid4().hex
    with ranks(_many, [(name,)] * SIZE) as started:
        for _, pipe in started:
            result = answer(pipe, COMPILED_S)
            assert not isinstance(result, str), result
            wrong, times = result
            assert wrong == 0
            print(f"us a layer with elementwise experts, by bucket: {times}")  # noqa: T201  (shown with -s)


def _busy(pipe: Connection, path: str, rank: int, name: str) -> Any:
    """Rank 1 computes for long, and takes part in joint forwards with no rows meanwhile, on another stream."""
    with _errors(pipe):
        me = Rank(path, rank, name)
        bucket, counts = 8, (8, 0)
        graph, static, result = me.capture(bucket, priority=-100)
        beside: Any = torch.cuda.Stream(priority=-100)  # type: ignore[no-untyped-call]
        matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) / 91
        own: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()
        me.handshake.barrier()
        busy = wrong = 0
        seconds: list[float] = []
        product = matrix
        if rank == 1:
            for _ in range(400):  # about half a second
                product = torch.mm(product, matrix)
        own.record()
        for seed in range(1, 21):
            for target, source in zip(static, inputs(bucket, counts, seed), strict=True):
                with torch.cuda.stream(beside):
                    target.copy_(source[rank])
            start = time.monotonic()
            with torch.cuda.stream(beside):
                graph.replay()
                me.wait(30)
            seconds.append(time.monotonic() - start)
            busy += not own.query()
            with torch.cuda.stream(beside):
                wrong += not torch.equal(result.cpu(), expected(bucket, counts, seed)[rank])
        own.synchronize()
        right = matrix
        if rank == 1:
            for _ in range(400):
                right = torch.mm(right, matrix)
        return wrong, busy, torch.equal(product, right), sorted(seconds)[len(seconds) // 2]


def test_a_rank_helps_while_it_computes() -> None:
    name = uuid.uuid4().hex
    with ranks(_busy, [(name,)] * SIZE) as started:
        for rank, (_, pipe) in enumerate(started):
            found = answer(pipe, COMPILED_S)
            assert not isinstance(found, str), found
            wrong, busy, same, median_s = found
            assert wrong == 0
            assert same  # and its own result is what it would be without
            assert (busy > 0) == (rank == 1)
            print(f"rank {rank}: {busy} of 20 while it computed, {1e6 * median_s:.0f} us")  # noqa: T201


def _missing(pipe: Connection, path: str, rank: int, name: str, limit_s: float) -> Any:
    with _errors(pipe):
        me = Rank(path, rank, name)
        graph, _, _ = me.capture(8)
        pipe.send("ready")
        if rank == 1:
            pipe.recv()
            return None
        graph.replay()
        start = time.monotonic()
        try:
            me.wait(limit_s)
        except DwdpRuntimeError as error:
            seconds = time.monotonic() - start
            return str(error), seconds, float(torch.ones(10, device="cuda").sum())  # the GPU goes on
        return "no error"


@pytest.mark.parametrize("killed", [False, True])
def test_a_wait_for_a_peer_that_does_not_come_ends_with_its_name(killed: bool) -> None:
    name = uuid.uuid4().hex
    limit_s = 60 if killed else 2
    with ranks(_missing, [(name, limit_s)] * SIZE) as started:
        for _, pipe in started:
            assert answer(pipe, COMPILED_S) == "ready"
        if killed:
            started[1][0].kill()
        error, seconds, total = answer(started[0][1], 90)
        assert f"MoE layer {LAYERS[0]} of a joint forward waited for ranks [1]" in error
        assert ("ranks [1] ended" if killed else "nothing came within 2 s") in error
        assert seconds < (30 if killed else 10)
        assert total == 10
