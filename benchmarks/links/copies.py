"""Staged copies between ranks, by the runtime's copy plan and copy engine: pair by pair, all at once, by slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, permutations
from typing import Any

import torch

from benchmarks.links.device import Device, gathered, together
from benchmarks.links.layer import UNCUT, SharedLayer
from sglang_dwdp.memory.handshake import Exchange

MIB = 1 << 20
SLICES_MIB = (0, 2, 4, 16, 32, 128)  # 0: uncut
DEFAULT_MIB = 32
REFERENCE_BYTES = 1 << 30
Reads = tuple[tuple[int, int], ...]  # (reader, source) at once; a source of -1 stands for all peers


def cases(size: int) -> Iterator[tuple[Reads, int]]:
    """Who reads from whom at once, and in slices of how many MiB: pairs one way, pairs both ways, all at once."""
    for pair in permutations(range(size), 2):
        yield (pair,), DEFAULT_MIB
    for low, high in combinations(range(size), 2):
        yield ((low, high), (high, low)), DEFAULT_MIB
    for mib in SLICES_MIB:
        yield tuple((rank, -1) for rank in range(size)), mib


def measure(device: Device, exchange: Exchange, layer: SharedLayer, save: Callable[[Any], None]) -> dict[str, Any]:
    """All measurements; the same result on every rank, whose ranks call this together.

    Args:
        device: This rank's.
        exchange: With the others.
        layer: What is copied.
        save: Gets what there is, time and again.

    Returns:
        `rows`: `reads`, `slice_mib`, and by rank `bytes_per_s` (None of ranks that only are read from), and where all
        read at once `under_product`: the time of a matrix product beside the copies over its time alone.
        `staged_is_right`. `reference`: one large copy for each pair, where ranks have GPUs of their own.
    """
    engine = device.memory.copy_engine(60.0)
    released, filled = engine.event(), engine.event()
    result: dict[str, Any] = {"rows": [], "staged_is_right": []}
    matrix = torch.ones(8192 if device.device != "cpu" else 64, 8192, device=device.device, dtype=torch.bfloat16)
    product = torch.empty(len(matrix), len(matrix), device=device.device, dtype=torch.bfloat16)

    def fill(plan: Any) -> None:
        engine.record(released)
        engine.fill(plan, released, filled)

    def copy(plan: Any) -> None:
        fill(plan)
        engine.wait(filled)

    def multiply(plan: Any = None) -> None:
        if plan is not None:
            fill(plan)
        torch.mm(matrix, matrix.T, out=product)

    def rate(plan: Any, nbytes: int) -> float:
        return nbytes / device.seconds(partial(copy, plan))

    def slowdown(plan: Any) -> float:
        return device.seconds(partial(multiply, plan)) / device.seconds(multiply)

    try:
        if exchange.rank == 0:
            result["reference"] = reference(device)
        for reads, mib in cases(exchange.size):
            source = next((source for reader, source in reads if reader == exchange.rank), None)
            plan, nbytes = None, 0
            if source is not None:
                copies = layer.plan(mib * MIB or UNCUT, None if source < 0 else source)
                plan, nbytes = engine.prepare(copies), sum(read.numel() for _, read in copies)
                if source < 0:
                    result["staged_is_right"].append(layer.staged_after(copies, partial(copy, plan)))
            row = {"reads": reads, "slice_mib": mib}
            row["bytes_per_s"] = together(exchange, partial(rate, plan, nbytes) if nbytes else None)
            if reads[0][1] < 0:
                row["under_product"] = together(exchange, partial(slowdown, plan))
            result["rows"].append(row)
            save(result)
    finally:
        engine.close()
    result["staged_is_right"] = all(gathered(exchange, all(result["staged_is_right"])))
    return result


def reference(device: Device) -> list[dict[str, Any]]:
    """What torch's `copy_` of a GiB reaches, for each pair of GPUs, in bytes per second; none without several GPUs."""
    count = torch.cuda.device_count() if device.device != "cpu" else 0
    rows = []
    for reader, source in permutations(range(count), 2):
        target = torch.empty(REFERENCE_BYTES, dtype=torch.uint8, device=f"cuda:{reader}")
        given = torch.empty(REFERENCE_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
        with torch.cuda.device(source):  # torch copies on the source's stream
            seconds = device.seconds(lambda target=target, given=given: target.copy_(given))  # type: ignore[misc]
        rows.append({"reads": [[reader, source]], "bytes_per_s": REFERENCE_BYTES / seconds})
        del target, given
        torch.cuda.empty_cache()
    return rows
