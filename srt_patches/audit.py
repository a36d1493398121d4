"""Counting collectives during forwards (--dwdp-audit): DWDP's claim is that there are none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.runtime_context import get_global_dwdp_manager
from torch.distributed import ProcessGroup

# Every collective of torch.distributed ends in one of these methods, under whatever name it was imported.
_PROCESS_GROUP = [
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
]
# SGLang's own communicators (PyNccl, custom and quick all-reduce, shared memory) are reached through these.
_COORDINATOR = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gatherv",
    "all_reduce",
    "broadcast",
    "broadcast_tensor_dict",
    "cp_all_gather_into_tensor_async",
    "fused_allreduce_rmsnorm",
    "gather",
    "recv",
    "recv_tensor_dict",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatterv",
    "send",
    "send_tensor_dict",
]


def count_collectives() -> None:
    """Count calls of more than one rank that are made while a forward is under way."""
    for name in _PROCESS_GROUP:
        if hasattr(ProcessGroup, name):
            setattr(ProcessGroup, name, _counted(getattr(ProcessGroup, name), lambda group: group.size()))
    for name in _COORDINATOR:
        if hasattr(GroupCoordinator, name):
            setattr(GroupCoordinator, name, _counted(getattr(GroupCoordinator, name), lambda group: group.world_size))


def _counted(function: Callable[..., Any], size_of: Callable[[Any], int]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
        manager = get_global_dwdp_manager()
        if manager is not None and manager.runtime.in_forward and size_of(group) > 1:
            manager.runtime.counters.collectives += 1
        return function(group, *args, **kwargs)

    return counted
