"""What a rank tells about its DWDP: to the launcher when it is ready, and to /server_info at any time."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.srt_patches.experts import group_number
from sglang_dwdp.srt_patches.forward import current_runtime
from sglang_dwdp.srt_patches.hooks import Hook


def add_state(_result: None, _controller: Any, state: dict[str, Any]) -> None:
    """After `SchedulerInternalStateController._add_topology`: whose they are and the counters, under "dwdp"."""
    state["dwdp"] = {"group": group_number(), **current_runtime().report()}


def add_ready(info: dict[str, Any], _scheduler: Any) -> dict[str, Any]:
    """After `Scheduler.get_init_info`: say that this rank serves through the runtime."""
    return {**info, "dwdp": current_runtime().report()}


def check_ready(_controller: Any, infos: list[dict[str, Any]]) -> None:
    """Before `DataParallelController._record_scheduler_init_infos`: every rank must have said so.

    A rank whose plugin failed to load would run SGLang's own DWDP.

    Raises:
        DwdpRuntimeError: a rank came up without the runtime.
    """
    first = int(get_parallel().node_rank) * len(infos)
    without = [rank for rank, info in enumerate(infos, first) if "dwdp" not in info]
    if without:
        raise DwdpRuntimeError(
            f"ranks {without} came up without the DWDP plugin that --enable-dwdp asks for. The log of those ranks "
            "says why it failed to load; SGLANG_PLUGINS must not leave it out."
        )


def add_ranks(info: dict[str, Any], controller: Any) -> dict[str, Any]:
    """After `DataParallelController.get_init_info`, whose fields replace those of the arguments in /server_info: the
    ranks that routers may name, where SGLang counts replicas only."""
    return {**info, "dp_size": len(controller.workers)}


SCHEDULER_HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController._add_topology",
        HookType.AFTER,
        add_state,
    ),
    Hook("sglang.srt.managers.scheduler.Scheduler.get_init_info", HookType.AFTER, add_ready),
)
CONTROLLER_HOOKS = (
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController._record_scheduler_init_infos",
        HookType.BEFORE,
        check_ready,
    ),
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info",
        HookType.AFTER,
        add_ranks,
    ),
)
