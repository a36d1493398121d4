"""New experts on all ranks at once: a forward reads the old ones or the new ones, and rejected ones change nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpRuntimeError, DwdpUpdateError
from sglang_dwdp.experts.update import Experts, agree
from sglang_dwdp.memory.base import Memory
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import (
    KINDS,
    Kind,
    PlainLayer,
    UnmappedMemory,
    checkpoint,
    equal,
    forward,
    open_resources,
    run_ranks,
)

# Experts of no whole number of pages, so that neighbours share some; "scale" is replicated.
TAILS = {"w13_weight": (77, 96), "w2_weight": (48, 99), "scale": (3,)}
GPU_TAILS = {"w13_weight": (1280, 1000), "w2_weight": (400, 320), "scale": (3,)}
Full = list[Any]


def other(full: Full) -> Full:
    """A checkpoint of the same shapes, with other values."""
    return [{name: tensor * 2 + 1 for name, tensor in layer.items()} for layer in full]


def shard_of(full: Full, layers: list[PlainLayer], rank: int) -> list[Experts]:
    shards = [layer.placement.shard(rank) for layer in layers]
    return [
        {name: tensor[shard.start : shard.stop].cpu() for name, tensor in part.items()}
        for part, shard in zip(full, shards, strict=True)
    ]


@contextmanager
def meeting(runtime: DwdpRuntime, number: int, timeout_s: float = 20) -> Iterator[Exchange]:
    exchange = Exchange(f"update {number} of {id(TAILS)}", runtime.rank, runtime.size, timeout_s)
    try:
        exchange.connect()
        yield exchange
    finally:
        exchange.close()


def update(runtime: DwdpRuntime, layers: list[PlainLayer], full: Full, number: int) -> None:
    new = shard_of(full, layers, runtime.rank)
    runtime.weights.check(new)
    with meeting(runtime, number) as exchange:
        agree(exchange, None)
        runtime.weights.update(exchange, new, lambda: None)


@pytest.mark.parametrize("local_experts", [None, 8])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_forward_reads_the_new_experts(kind: Kind, size: int, local_experts: int | None) -> None:
    full = checkpoint(5, 10, TAILS if kind.device == "cpu" else GPU_TAILS, kind.device)
    versions = [full, other(full), other(other(full))]

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[bool]:
        seen, addresses = [], []
        for number, version in enumerate(versions):
            if number:
                update(runtime, layers, version, number)
            seen += [equal(forward(runtime, layers, tokens), version) for tokens in (1000, 1, 1000, 1)]
            addresses.append([layer.tensors["w2_weight"].data_ptr() for layer in layers])
        return [*seen, addresses[0] == addresses[1] == addresses[2], runtime.report()["late_fills"] == 0]

    config = DwdpConfig(depth=2, timeout_s=20, local_experts=local_experts)
    before = open_resources()
    assert run_ranks(size, full, step, config) == [[True] * 14] * size
    if kind.device == "cpu":
        assert open_resources() == before


def test_where_memory_cannot_be_mapped() -> None:
    full = checkpoint(5, 10, TAILS)
    new = other(full)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[bool]:
        seen = [equal(forward(runtime, layers, 9), full)]
        update(runtime, layers, new, 1)
        return [*seen, equal(forward(runtime, layers, 9), new), equal(forward(runtime, layers, 9), new)]

    memory: Callable[[int], Memory] = lambda _rank: UnmappedMemory()  # noqa: E731
    assert run_ranks(3, full, step, DwdpConfig(view="staged", timeout_s=20), memory=memory) == [[True] * 3] * 3


def test_a_rank_reads_the_experts_that_it_stores() -> None:
    full = checkpoint(2, 10, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        forward(runtime, layers, 1000)
        own = shard_of(full, layers, runtime.rank)
        return equal(runtime.weights.read(), own) and equal(runtime.weights.view(), own)

    assert run_ranks(3, full, step) == [True] * 3
    unmapped: Callable[[int], Memory] = lambda _rank: UnmappedMemory()  # noqa: E731
    assert run_ranks(3, full, step, DwdpConfig(view="staged", timeout_s=20), memory=unmapped) == [True] * 3


def test_ranks_that_forward_all_the_time_see_no_mix() -> None:
    """Each forward compares what it reads of all layers with both versions."""
    versions = [checkpoint(4, 9, TAILS)]
    versions.append(other(versions[0]))
    waiting = threading.Barrier(3)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[int]:
        order = []
        for number in range(1, 7):
            # Ranks come to an update at different times, after different numbers of forwards.
            for turn in range(1 + (runtime.rank + number) % 3):
                seen = forward(runtime, layers, (1000, 1)[turn % 2])
                order.append(next((i for i, version in enumerate(versions) if equal(seen, version)), -1))
            update(runtime, layers, versions[number % 2], 100 + number)
        waiting.wait(20)
        return order

    for order in run_ranks(3, versions[0], step, DwdpConfig(depth=2, timeout_s=20)):
        assert order[0] == 0
        assert -1 not in order
        assert set(order) == {0, 1}


def test_one_rank_that_cannot_keeps_all_from_it() -> None:
    full = checkpoint(2, 10, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[Any]:
        said = ""
        with meeting(runtime, 7) as exchange:
            try:
                agree(exchange, "its disk is gone" if runtime.rank == 1 else None)
            except DwdpUpdateError as error:
                said = str(error)
        return [said, equal(forward(runtime, layers, 1000), full)]

    assert run_ranks(3, full, step) == [["rank 1: its disk is gone", True]] * 3


def test_a_rank_that_does_not_come() -> None:
    full = checkpoint(1, 6, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> str:
        if runtime.rank == 1:
            return "rank 1 did not come within 0.3 s"
        exchange = Exchange("alone", runtime.rank, runtime.size, 0.3)
        try:
            exchange.connect()
        except Exception as error:  # noqa: BLE001
            return str(error)
        return ""

    said = run_ranks(2, full, step)
    assert "ranks [1] did not come within 0.3 s" in said[0]


@pytest.mark.parametrize("change", [{"w13_weight": (77, 95)}, {"scale": (4,)}])
def test_other_shapes_are_rejected_before_peers_are_met(change: dict[str, tuple[int, ...]]) -> None:
    full, new = checkpoint(1, 6, TAILS), checkpoint(1, 6, TAILS | change)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> Any:
        with pytest.raises(DwdpUpdateError, match=f"layer 1, {next(iter(change))}"):
            runtime.weights.check(shard_of(new, layers, runtime.rank))
        return equal(forward(runtime, layers, 1000), full)

    assert run_ranks(2, full, step) == [True, True]


def test_a_rank_that_ends_after_some_have_written_ends_all() -> None:
    full = checkpoint(1, 6, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> None:
        def fail() -> None:
            if runtime.rank == 1:
                raise OSError("out of memory")

        with meeting(runtime, 8) as exchange:
            runtime.weights.update(exchange, shard_of(other(full), layers, runtime.rank), fail)

    for error in run_ranks(2, full, step):
        assert isinstance(error, DwdpRuntimeError)
        assert "out of memory" in str(error)


def permissions() -> set[str]:
    """Of all pages that hold experts, as Linux says them."""
    return {line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if "sglang-dwdp" in line}


def test_experts_are_read_only_before_and_after() -> None:
    """Nobody but an update writes what peers read."""
    held: list[set[str]] = []
    full = checkpoint(1, 6, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> None:
        held.append(permissions())
        with meeting(runtime, 9) as exchange:
            runtime.weights.update(
                exchange, shard_of(other(full), layers, runtime.rank), lambda: held.append(permissions())
            )
            exchange.barrier()
        held.append(permissions())

    run_ranks(2, full, step, DwdpConfig(view="direct", timeout_s=20))
    assert any("rw-s" in found for found in held[1:-1])
    assert held[-1] == {"r--s"}


def test_reading_binds_all_experts() -> None:
    full = checkpoint(3, 10, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        forward(runtime, layers, 1000)
        with runtime.reading():
            return equal([layer.tensors for layer in layers], full)

    assert run_ranks(2, full, step, DwdpConfig(depth=1, timeout_s=20)) == [True, True]


@pytest.mark.parametrize("local_experts", [None, 8])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_released_and_comes_back_at_its_addresses(kind: Kind, size: int, local_experts: int | None) -> None:
    full = checkpoint(5, 10, TAILS if kind.device == "cpu" else GPU_TAILS, kind.device)
    new = other(full)
    together = threading.Barrier(size)
    mapped: list[int] = []

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[bool]:
        seen = [equal(forward(runtime, layers, tokens), full) for tokens in (1000, 1)]
        addresses = [layer.tensors["w2_weight"].data_ptr() for layer in layers]
        for number in (21, 22):
            runtime.weights.release()
            together.wait(20)
            mapped.append(open_resources()[1])
            for use in (lambda: forward(runtime, layers, 1), runtime.weights.read):
                with pytest.raises(DwdpRuntimeError, match="was released"):
                    use()
            together.wait(20)
            with meeting(runtime, number) as exchange:
                runtime.weights.restore(exchange)
            update(runtime, layers, new, 10 + number)
            seen += [equal(forward(runtime, layers, tokens), new) for tokens in (1000, 1000, 1)]
        return [*seen, addresses == [layer.tensors["w2_weight"].data_ptr() for layer in layers]]

    config = DwdpConfig(depth=2, timeout_s=20, local_experts=local_experts)
    before = open_resources()
    assert run_ranks(size, full, step, config) == [[True] * 9] * size
    assert set(mapped) == {0}
    if kind.device == "cpu":
        assert open_resources() == before


def test_memory_that_comes_back_is_read_only() -> None:
    full = checkpoint(1, 6, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> None:
        runtime.weights.release()
        with meeting(runtime, 23) as exchange:
            runtime.weights.restore(exchange)
            found = permissions()
            exchange.barrier()
        assert found == {"r--s"}

    assert run_ranks(2, full, step, DwdpConfig(view="direct", timeout_s=20)) == [None, None]


def test_memory_that_cannot_be_mapped_is_kept() -> None:
    full = checkpoint(2, 10, TAILS)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        with pytest.raises(DwdpRuntimeError, match="cannot be released"):
            runtime.weights.release()
        return equal(forward(runtime, layers, 9), full)

    memory: Callable[[int], Memory] = lambda _rank: UnmappedMemory()  # noqa: E731
    assert run_ranks(2, full, step, DwdpConfig(view="staged", timeout_s=20), memory=memory) == [True, True]
