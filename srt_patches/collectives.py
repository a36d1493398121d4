"""No collective in a forward: a rank that called one would wait for ranks that run other requests, or none.

The guard is always on. It looks at each call of a collective, so a forward without any pays nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context import is_in_breakable_cuda_graph
from sglang.srt.runtime_context import get_global_dwdp_manager
from torch.distributed import ProcessGroup

from sglang_dwdp.errors import DwdpRuntimeError

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


# SGLang's ranks capture graphs in step, and wait for each other before they begin.
_AROUND_CAPTURES = frozenset({"barrier"})


def guard_collectives(device: str | None) -> None:
    """Make a collective of more than one rank an error while a forward runs, or is captured in a CUDA graph.

    Args:
        device: The kind of device that the server runs on.
    """
    is_capturing = _is_capturing if device == "cuda" else lambda: False
    for owner, names, size_of in (
        (ProcessGroup, _PROCESS_GROUP, lambda group: group.size()),
        (GroupCoordinator, _COORDINATOR, lambda group: group.world_size),
    ):
        for name in sorted(names):
            if hasattr(owner, name):
                setattr(owner, name, _guarded(getattr(owner, name), size_of, is_capturing))


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing() or is_in_breakable_cuda_graph()


def _guarded(
    function: Callable[..., Any], size_of: Callable[[Any], int], is_capturing: Callable[[], bool]
) -> Callable[..., Any]:
    name = function.__name__

    @functools.wraps(function)
    def guarded(group: Any, *args: Any, **kwargs: Any) -> Any:
        manager = get_global_dwdp_manager()
        if manager is not None:
            in_forward = manager.runtime.in_forward
            if (in_forward or (is_capturing() and name not in _AROUND_CAPTURES)) and size_of(group) > 1:
                where = "forward" if in_forward else "CUDA graph"
                raise DwdpRuntimeError(
                    f"{name} over {size_of(group)} ranks was called in a {where}. Ranks of DWDP run their requests "
                    "alone, so it would hang, or take in other requests: SGLang's code for this model or option is "
                    "unsupported (the traceback says where). Serve without --enable-dwdp."
                )
        return function(group, *args, **kwargs)

    return guarded
