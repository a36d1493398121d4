"""Joint layers over host memory, against the reference."""

from __future__ import annotations

import gc
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange import host_inbox
from sglang_dwdp.exchange.host_inbox import HostInbox, share_inbox
from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.exchange.layer import run_joint, shard_table
from sglang_dwdp.experts.placement import Placement, balanced
from tests.fixtures.joint_layer import joint_layer
from tests.unit.exchange.moe import Weights, random_rows
from tests.unit.exchange.processes import answer, ranks

HIDDEN, TOP_K, EXPERTS = 16, 3, 7
SHAPE = RowShape(max_bucket=8, hidden_size=HIDDEN, top_k=TOP_K, dtype=torch.bfloat16)
WEIGHTS = Weights.random(EXPERTS, HIDDEN, 8)


@contextmanager
def inboxes(size: int, limit_s: float = 20) -> Iterator[list[HostInbox]]:
    fd = host_inbox.create(size, SHAPE)
    made = [HostInbox(fd, rank, size, SHAPE, limit_s, lambda: []) for rank in range(size)]
    os.close(fd)
    try:
        yield made
    finally:
        for inbox in made:
            inbox.close()
            inbox.close()


def reference(placement: Placement, rows: Any, ids: Any, weights: Any) -> list[torch.Tensor]:
    shards = [placement.shard(rank) for rank in range(placement.group_size)]
    return joint_layer(rows, ids, weights, [WEIGHTS.shard(shard).experts() for shard in shards], shards)


def run(
    made: list[HostInbox], layers: list[list[int]], pause: Callable[[int, int], float] = lambda rank, layer: 0
) -> list[list[torch.Tensor]]:
    """Each layer's results of all ranks, each a thread; `layers` has the numbers of rows."""
    size = len(made)
    placement = balanced(EXPERTS, size)

    def one(rank: int) -> list[torch.Tensor]:
        shard = placement.shard(rank)
        compute, table = WEIGHTS.shard(shard).experts(), shard_table(EXPERTS, shard, "cpu", local=True)
        results = []
        for layer, counts in enumerate(layers):
            rows, ids, weights = (each[rank] for each in random_rows(counts, HIDDEN, TOP_K, EXPERTS, layer))
            time.sleep(pause(rank, layer))
            results.append(run_joint(made[rank], layer, max(counts), rows, ids, weights, compute, table))
        return results

    with ThreadPoolExecutor(size) as pool:
        return list(map(list, zip(*pool.map(one, range(size)), strict=True)))


@given(size=st.integers(2, 3), data=st.data())
def test_layers_are_bitwise_the_references(size: int, data: st.DataObject) -> None:
    """Unequal rows, idle ranks, other buckets in each layer."""
    counts = st.lists(st.integers(0, SHAPE.max_bucket), min_size=size, max_size=size).filter(any)
    layers = data.draw(st.lists(counts, min_size=1, max_size=4))
    with inboxes(size) as made:
        for layer, (counts_here, found) in enumerate(zip(layers, run(made, layers), strict=True)):
            rows, ids, weights = random_rows(counts_here, HIDDEN, TOP_K, EXPERTS, layer)
            expected = reference(balanced(EXPERTS, size), rows, ids, weights)
            assert [len(result) for result in found] == counts_here
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_slow_rank_reads_what_was_meant_for_it() -> None:
    """Nobody may write the next layer's rows or sums over those that a slow peer has yet to read."""
    layers = [[3, 0, 8], [1, 2, 3]] * 10
    with inboxes(3) as made:
        found = run(made, layers, lambda rank, layer: 0.01 if layer % 3 == rank else 0)
    for layer, counts in enumerate(layers):
        expected = reference(balanced(EXPERTS, 3), *random_rows(counts, HIDDEN, TOP_K, EXPERTS, layer))
        assert all(torch.equal(a, b) for a, b in zip(found[layer], expected, strict=True))


def test_the_error_is_that_of_rounding_partial_sums() -> None:
    """Against float64: each partial sum and the result are rounded once to bf16."""
    rows, ids, weights = random_rows([64], HIDDEN, TOP_K, EXPERTS, seed=1)
    exact = WEIGHTS.to(torch.float64).experts()(rows[0].double(), ids[0], weights[0])
    for size in (1, 2, 3):
        placement = balanced(EXPERTS, size)
        idle = [torch.empty(0, *rows[0].shape[1:]).bfloat16()] * (size - 1)
        none = [torch.empty(0, TOP_K, dtype=torch.int32)] * (size - 1)
        found = reference(placement, rows + idle, ids + none, weights + [w.float() for w in none])[0]
        shards = [placement.shard(rank) for rank in range(size)]
        partial = [
            WEIGHTS.shard(shard)
            .to(torch.float64)
            .experts()(rows[0].double(), shard_table(EXPERTS, shard, "cpu", local=True)[ids[0]], weights[0])
            for shard in shards
        ]
        bound = 2**-8 * (exact.abs() + sum(part.abs() for part in partial)) + 1e-5
        assert ((found.double() - exact).abs() <= bound).all()


def test_ids_are_counted_as_the_kernel_wants_them() -> None:
    ids = torch.tensor([[-1, 0, 2], [3, 4, 6]], dtype=torch.int32)
    for local, expected in ((True, [[-1, -1, 0], [1, -1, -1]]), (False, [[-1, -1, 2], [3, -1, -1]])):
        assert shard_table(7, range(2, 4), "cpu", local=local)[ids].tolist() == expected


def test_a_peer_that_sends_nothing_is_named() -> None:
    with inboxes(2, limit_s=0.1) as (first, _):
        rows, ids, weights = (each[0] for each in random_rows([2], HIDDEN, TOP_K, EXPERTS, 0))
        start = time.monotonic()
        with pytest.raises(DwdpRuntimeError, match=r"rank 0: MoE layer 5 .* rank 1 sent no rows: not within 0.1 s"):
            first.dispatch(5, 2, rows, ids, weights)
        assert time.monotonic() - start < 5
        with pytest.raises(ValueError, match="bucket of 1"):
            first.dispatch(5, 1, rows, ids, weights)


def test_a_peer_that_sends_no_sums_is_named() -> None:
    with inboxes(2, limit_s=0.2) as (first, second):
        rows, ids, weights = random_rows([2, 1], HIDDEN, TOP_K, EXPERTS, 0)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(i.dispatch, 5, 2, rows[r], ids[r], weights[r]) for r, i in enumerate((first, second))]
            assert both[1].result().rows.shape == (4, HIDDEN)
            received = both[0].result()
        with pytest.raises(DwdpRuntimeError, match="rank 1 sent no partial sums"):
            first.combine(received.rows)


def test_a_peer_that_ended_is_named_at_once() -> None:
    fd = host_inbox.create(2, SHAPE)
    inbox = HostInbox(fd, 0, 2, SHAPE, 60, lambda: [1])
    rows, ids, weights = (each[0] for each in random_rows([2], HIDDEN, TOP_K, EXPERTS, 0))
    start = time.monotonic()
    with pytest.raises(DwdpRuntimeError, match="rank 1 sent no rows: its process ended"):
        inbox.dispatch(0, 2, rows, ids, weights)
    assert time.monotonic() - start < 5
    inbox.close()
    os.close(fd)


def test_set_up_hands_one_memory_to_all_and_close_leaves_nothing() -> None:
    from sglang_dwdp.memory.handshake import Exchange

    name, made = uuid.uuid4().hex, {}
    before = len(os.listdir("/proc/self/fd"))

    def one(rank: int) -> None:
        handshake = Exchange(name, rank, 2, 10)
        handshake.connect()
        made[rank] = share_inbox(handshake, SHAPE, 10, lambda: [])
        handshake.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    found = run([made[0], made[1]], [[2, 1]])
    expected = reference(balanced(EXPERTS, 2), *random_rows([2, 1], HIDDEN, TOP_K, EXPERTS, 0))
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected, strict=True))
    for inbox in made.values():
        inbox.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert "sglang-dwdp-inbox" not in Path("/proc/self/maps").read_text()


def _layers(pipe: Connection, path: str, rank: int, memory: str, counts: list[list[int]]) -> Any:
    fd = os.open(memory, os.O_RDWR)
    inbox = HostInbox(fd, rank, 2, SHAPE, 20, lambda: [])
    os.close(fd)
    shard = balanced(EXPERTS, 2).shard(rank)
    compute, table = WEIGHTS.shard(shard).experts(), shard_table(EXPERTS, shard, "cpu", local=True)
    results = []
    for layer, here in enumerate(counts):
        rows, ids, weights = (each[rank] for each in random_rows(here, HIDDEN, TOP_K, EXPERTS, layer))
        results.append(
            run_joint(inbox, layer, max(here), rows, ids, weights, compute, table).view(torch.int16).tolist()
        )
    return results


def test_ranks_in_processes_of_their_own() -> None:
    counts = [[1, 4], [0, 8], [5, 5]] * 20
    fd = host_inbox.create(2, SHAPE)
    with ranks(_layers, [(f"/proc/{os.getpid()}/fd/{fd}", counts)] * 2) as started:
        found = [answer(pipe, 90) for _, pipe in started]
    os.close(fd)
    for layer, here in enumerate(counts):
        expected = reference(balanced(EXPERTS, 2), *random_rows(here, HIDDEN, TOP_K, EXPERTS, layer))
        assert [each[layer] for each in found] == [result.view(torch.int16).tolist() for result in expected]
