"""Counting collectives during forwards (--dwdp-audit): DWDP's claim is that there are none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.runtime_context import get_global_dwdp_manager
from torch.distributed import ProcessGroup

# What `torch.distributed` calls, under whatever name its functions were imported: the methods of several releases of
# torch, each of which has some. Functional collectives (`torch.distributed._functional_collectives`) go past them;
# SGLang's models do not use those.
_PROCESS_GROUP = frozenset(
    {
        "_allgather_base",
        "_reduce_scatter_base",
        "all_gather_single",
        "all_gather_single_coalesced",
        "all_to_all_single",
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
        "gather_into_tensor",
        "gather_single",
        "monitored_barrier",
        "recv",
        "recv_anysource",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
        "scatter",
        "send",
    }
)
# SGLang's own communicators (PyNccl, custom and quick all-reduce, shared memory) are reached through these.
_COORDINATOR = frozenset(
    {
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_gatherv",
        "all_reduce",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "broadcast_object",
        "broadcast_object_list",
        "broadcast_tensor_dict",
        "cp_all_gather_into_tensor_async",
        "fused_allreduce_rmsnorm",
        "fused_allreduce_rmsnorm_quant_per_group",
        "gather",
        "quant_all_reduce",
        "recv",
        "recv_object",
        "recv_tensor_dict",
        "reduce_scatter",
        "reduce_scatter_along_dim",
        "reduce_scatter_tensor",
        "reduce_scatterv",
        "send",
        "send_object",
        "send_recv_tensor_dict",
        "send_tensor_dict",
    }
)


def count_collectives() -> None:
    """Count calls of more than one rank that are made while a forward is under way; one that calls another counts as
    two."""
    for name in sorted(_PROCESS_GROUP):
        if hasattr(ProcessGroup, name):
            setattr(ProcessGroup, name, _counted(getattr(ProcessGroup, name), lambda group: group.size()))
    for name in sorted(_COORDINATOR):
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
