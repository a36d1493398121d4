"""What one large copy between two GPUs reaches: plain allocations, one process, nothing of this package."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations, permutations
from typing import Any

import torch

NBYTES = 1 << 30
COPIES = 20
REPEATS = 3
METHODS = ("torch", "driver")


def large_copies(devices: int) -> list[dict[str, Any]]:
    """Rows of `reads` ((reader, source) at once) and, by method, bytes per second of the slowest of them.

    `torch`: `copy_` between the devices.  `driver`: `cuMemcpyAsync` on a stream of the reader. One GPU copies within
    itself; without a GPU there are no rows.
    """
    if not devices or not torch.cuda.is_available():
        return []
    ranks = range(devices)
    reads: list[tuple[tuple[int, int], ...]] = [((0, 0),)] if devices == 1 else []
    reads += [((reader, source),) for reader, source in permutations(ranks, 2)]
    reads += [((low, high), (high, low)) for low, high in combinations(ranks, 2)]
    sources = [torch.empty(NBYTES, dtype=torch.uint8, device=f"cuda:{rank}") for rank in ranks]
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


def best(rows: Sequence[dict[str, Any]], reads: Sequence[Sequence[int]]) -> float | None:
    """Bytes per second of the faster method for these reads; None where they were not measured."""
    wanted = sorted(tuple(pair) for pair in reads)
    for row in rows:
        if sorted(tuple(pair) for pair in row["reads"]) == wanted:
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
