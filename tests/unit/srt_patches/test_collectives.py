"""A collective in a forward, or in the capture of one, is an error that names it; elsewhere it runs."""

from __future__ import annotations

import functools
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

from sglang_dwdp.srt_patches import collectives as guard

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
    runtime = SimpleNamespace(in_forward=False)
    guard.get_global_dwdp_manager = lambda: SimpleNamespace(runtime=runtime)  # type: ignore[assignment]
    capturing = False
    guard._is_capturing = lambda: capturing  # type: ignore[assignment]
    guard.guard_collectives("cuda")
    alone = dist.new_group([0]), dist.new_group([1])
    seen: dict[str, Any] = {}

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  (it is the result)
            seen[name] = f"{type(error).__name__}: {error}"
        else:
            seen[name] = "ran"

    for name, call in collectives().items():
        attempt(f"{name} outside", functools.partial(call, rank))
        runtime.in_forward = True
        attempt(f"{name} in a forward", functools.partial(call, rank))
        runtime.in_forward, capturing = False, True
        attempt(f"{name} in a capture", functools.partial(call, rank))
        capturing = False
    runtime.in_forward = True
    attempt("alone", lambda: dist.all_reduce(torch.ones(1), group=alone[rank]))
    results.put(seen)
    dist.destroy_process_group()


def test_every_collective_of_torch_is_an_error_in_a_forward(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for seen in (results.get(timeout=200), results.get(timeout=200)):
            assert seen.pop("alone") == "ran"
            assert seen.pop("barrier in a capture") == "ran"  # SGLang's own, around captures
            for name, result in seen.items():
                if name.endswith("outside"):
                    assert result == "ran", name
                else:
                    error = r"DwdpRuntimeError: \w+ over 2 ranks was called in a (forward|CUDA graph)"
                    assert re.match(error, result), (name, result)
    finally:
        for process in ranks:
            process.join(30)
            process.kill()


def test_no_method_that_sounds_like_a_collective_is_left_out() -> None:
    names = {name for name in vars(ProcessGroup) if WORDS.match(name)}
    assert len(names) > 15
    assert names <= guard._PROCESS_GROUP
    methods = {name for name, _ in inspect.getmembers(GroupCoordinator, inspect.isfunction) if WORDS.search(name)}
    public = {name for name in methods if not name.startswith("_")}
    assert len(public) > 15
    assert public <= guard._COORDINATOR
