"""What one large copy between two GPUs reaches: plain allocations, and nothing of this package's views and plans.

In one process that has all GPUs, and by ranks that open each other's allocations (CUDA IPC) and pull, as the runtime
does: what the two differ by comes from processes of their own, not from views or plans.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations, permutations
from typing import Any

import torch

from benchmarks.multi.bench import Bench
from benchmarks.multi.together import gathered, together
from sglang_dwdp.memory.handles import agree_on_handles, swap_blocks
from sglang_dwdp.memory.handshake import Exchange

NBYTES = 1 << 30
COPIES = 20
REPEATS = 3
METHODS = ("torch", "driver")
RANKS = "ranks"  # the third method


def large_copies(devices: int) -> list[dict[str, Any]]:
    """Rows of `reads` ((reader, source) at once) and, by method, bytes per second of the slowest of them.

    `torch`: `copy_` between the devices, which the source pushes.  `driver`: `cuMemcpyAsync` on a stream of the
    reader, which pulls. One GPU copies within itself; without a GPU there are no rows.
    """
    if not devices or not torch.cuda.is_available():
        return []
    ranks = range(devices)
    reads: list[tuple[tuple[int, int], ...]] = [((0, 0),)] if devices == 1 else []
    reads += [((reader, source),) for reader, source in permutations(ranks, 2)]
    reads += [((low, high), (high, low)) for low, high in combinations(ranks, 2)]
    sources = [torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, device=f"cuda:{rank}") for rank in ranks]
    targets = [torch.empty_like(source) for source in sources]
    if devices > 1:  # torch lets the GPUs reach each other when it first copies; both ways are needed
        for reader, source in permutations(ranks, 2):
            targets[reader].copy_(sources[source])
    result = []
    for each in reads:
        rates = {method: _rate(method, each, sources, targets) for method in METHODS}
        result.append({"reads": each, "bytes_per_s": rates})
    for rank in ranks:
        with torch.cuda.device(rank):
            torch.cuda.empty_cache()
    return result


def copies_of_ranks(bench: Bench, exchange: Exchange) -> list[dict[str, Any]]:
    """Rows as of `large_copies`, with the method `ranks`: all ranks call this together. None without GPUs."""
    memory = bench.plain_memory()
    if memory is None:
        return []
    with ExitStack() as stack:
        kind = agree_on_handles(memory, exchange)
        blocks = swap_blocks(memory, exchange, kind, [[NBYTES]] * exchange.size, stack)
        stack.callback(exchange.barrier)  # no block is given back while a peer reads it
        sources = [blocks[rank][0].tensor() for rank in range(exchange.size)]
        sources[exchange.rank].random_(0, 256)
        memory.finish_writes()
        exchange.barrier()
        target = torch.empty_like(sources[exchange.rank])
        engine = bench.engine(1, batched=True, prefer_overlap=True)
        stack.callback(engine.close)
        pairs: list[tuple[tuple[int, int], ...]] = [(pair,) for pair in permutations(range(exchange.size), 2)]
        pairs += [((low, high), (high, low)) for low, high in combinations(range(exchange.size), 2)]
        rows = []
        for reads in pairs:
            mine = [source for reader, source in reads if reader == exchange.rank]
            call = None
            if mine:
                plan = engine.prepare([(target, sources[mine[0]])])
                bench.run(engine, plan, 2, 0)
                call = partial(_seconds_of_one, bench, engine, plan)
            seconds = max(gathered(exchange, together(exchange, call)))
            rows.append({"reads": reads, "bytes_per_s": {RANKS: NBYTES / seconds}})
        return rows


def _seconds_of_one(bench: Bench, engine: Any, plan: Any) -> float:
    return bench.run(engine, plan, COPIES, 0)[0] / COPIES


def joined(rows: Sequence[dict[str, Any]], more: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same reads brought together."""
    result = [{"reads": row["reads"], "bytes_per_s": dict(row["bytes_per_s"])} for row in rows]
    known = {_key(row["reads"]): row for row in result}
    for row in more:
        if (found := known.get(_key(row["reads"]))) is not None:
            found["bytes_per_s"] |= row["bytes_per_s"]
        else:
            result.append(row)
    return result


def _key(reads: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(sorted(tuple(pair) for pair in reads))


def best(rows: Sequence[dict[str, Any]], reads: Sequence[Sequence[int]]) -> float | None:
    """Bytes per second of the fastest method for these reads; None where they were not measured."""
    for row in rows:
        if _key(row["reads"]) == _key(reads):
            return float(max(row["bytes_per_s"].values()))
    return None


def _rate(
    method: str, reads: Sequence[tuple[int, int]], sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> float:
    from cuda.bindings import driver

    from sglang_dwdp.memory.cuda_driver import call

    # torch copies on the source's current stream and has it wait for the reader's, and the other way round, by events:
    # with streams of their own, the two directions do not wait for each other.
    streams = [(torch.cuda.Stream(reader), torch.cuda.Stream(source)) for reader, source in reads]  # type: ignore[no-untyped-call]

    def copy(stream: Any, reader: int, source: int) -> None:
        if method == "torch":
            targets[reader].copy_(sources[source], non_blocking=True)
        else:
            addresses = targets[reader].data_ptr(), sources[source].data_ptr()
            call(driver.cuMemcpyAsync, *addresses, NBYTES, stream.cuda_stream)

    def seconds(copies: int) -> float:
        for rank in range(len(sources)):
            torch.cuda.synchronize(rank)
        marks = []
        for (at_reader, at_source), (reader, source) in zip(streams, reads, strict=True):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            with torch.cuda.stream(at_source), torch.cuda.stream(at_reader):  # the reader's device is current
                first.record(at_reader)
                for _ in range(copies):
                    copy(at_reader, reader, source)
                last.record(at_reader)
            marks.append((first, last))
        for rank in range(len(sources)):
            torch.cuda.synchronize(rank)
        return max(float(first.elapsed_time(last)) for first, last in marks) / 1e3

    seconds(2)
    return NBYTES * COPIES / statistics.median(seconds(COPIES) for _ in range(REPEATS))
