"""The counter behind "no collective in a forward" sees collectives."""

from __future__ import annotations

import inspect
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.distributed.parallel_state import GroupCoordinator
from torch.distributed import ProcessGroup

from sglang_dwdp.srt_patches import audit

WORDS = re.compile(
    r"^_?(all_?(gather|reduce|to)|barrier|broadcast|gather|monitored|recv|reduce|scatter|send)|allreduce"
)


def collectives() -> dict[str, Callable[[int], object]]:
    """The public collectives of torch.distributed, for two ranks; each takes the rank."""
    one, two = torch.ones(2), torch.zeros(4)
    parts = [torch.zeros(2), torch.zeros(2)]

    def pair(rank: int) -> object:
        return dist.send(one, 1) if rank == 0 else dist.recv(torch.zeros(2), 0)

    return {
        "all_gather": lambda _rank: dist.all_gather(parts, one),
        "all_gather_into_tensor": lambda _rank: dist.all_gather_into_tensor(two, one),
        "all_gather_object": lambda _rank: dist.all_gather_object([None, None], 1),
        "all_reduce": lambda _rank: dist.all_reduce(one),
        "all_to_all_single": lambda _rank: dist.all_to_all_single(torch.zeros(2), one),
        "barrier": lambda _rank: dist.barrier(),
        "broadcast": lambda _rank: dist.broadcast(one, 0),
        "broadcast_object_list": lambda _rank: dist.broadcast_object_list([1], 0),
        "gather": lambda rank: dist.gather(one, parts if rank == 0 else None),
        "reduce": lambda _rank: dist.reduce(one, 0),
        "reduce_scatter_tensor": lambda _rank: dist.reduce_scatter_tensor(torch.zeros(1), one),
        "scatter": lambda rank: dist.scatter(torch.zeros(2), parts if rank == 0 else None),
        "send and recv": pair,
    }


def _rank(rank: int, store: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    runtime = SimpleNamespace(in_forward=True, counters=SimpleNamespace(collectives=0))
    audit.get_global_dwdp_manager = lambda: SimpleNamespace(runtime=runtime)  # type: ignore[assignment]
    audit.count_collectives()
    counted: dict[str, Any] = {}
    for name, call in collectives().items():
        before = runtime.counters.collectives
        try:
            call(rank)
        except Exception as error:  # noqa: BLE001  (the test says which one, and why)
            counted[name] = repr(error)
            continue
        counted[name] = runtime.counters.collectives - before
    runtime.in_forward = False
    before = runtime.counters.collectives
    dist.all_reduce(torch.ones(1))
    counted["outside of a forward"] = runtime.counters.collectives - before
    results.put(counted)
    dist.destroy_process_group()


def test_every_collective_of_torch_is_counted(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for counted in (results.get(timeout=120), results.get(timeout=120)):
            assert counted.pop("outside of a forward") == 0
            assert set(counted) == set(collectives())
            missed = {name: count for name, count in counted.items() if not isinstance(count, int) or count < 1}
            assert not missed
    finally:
        for process in ranks:
            process.join(30)
            process.kill()


def test_no_method_that_sounds_like_a_collective_is_left_out() -> None:
    names = {name for name in vars(ProcessGroup) if WORDS.match(name)}
    assert len(names) > 15
    assert names <= audit._PROCESS_GROUP
    methods = {name for name, _ in inspect.getmembers(GroupCoordinator, inspect.isfunction) if WORDS.search(name)}
    public = {name for name in methods if not name.startswith("_")}
    assert len(public) > 15
    assert public <= audit._COORDINATOR
