"""Weights are fixed while a server runs: peers read them in place, and layers are bound to slots.

SGLang's models can declare that theirs cannot be updated or exported, which every front end's requests meet in the
ranks. Hooks are for what SGLang does without asking, and for answers that would have no reason in them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook

logger = logging.getLogger(__name__)

_REASON = (
    "not supported with --enable-dwdp: other ranks read these weights in place. "
    "Restart the server with the new weights, or serve without --enable-dwdp."
)
_UPDATE = f"Updating weights is {_REASON}"
_EXPORT = f"Reading a running server's weights is {_REASON}"
_MEMORY = f"Releasing and resuming memory is {_REASON}"


def declare_fixed(model: torch.nn.Module) -> None:
    """Let SGLang answer requests that would update or export this model's weights with an error."""
    vars(model)["_derived_weight_cache_error"] = _UPDATE
    vars(model)["_weight_export_error"] = _EXPORT


def reject_group(_updater: Any, *_args: Any, **_kwargs: Any) -> tuple[bool, str]:
    """In place of `WeightUpdater.init_weights_update_group`, before a rank waits for its trainer."""
    return False, _UPDATE


def reject_begin(_manager: Any, _request: Any) -> Any:
    """In place of `SchedulerWeightUpdaterManager.begin_weight_update`, which other updates want first."""
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput

    return BeginWeightUpdateReqOutput(success=False, message=_UPDATE)


def reject_check(_manager: Any, _request: Any) -> Any:
    """In place of `SchedulerWeightUpdaterManager.check_weights`: what it would read or reset may be a slot."""
    from sglang.srt.managers.io_struct import CheckWeightsReqOutput

    return CheckWeightsReqOutput(success=False, message=_EXPORT)


def reject_release(_manager: Any, _request: Any) -> Any:
    """In place of `SchedulerWeightUpdaterManager.release_memory_occupation`, whose answer has no room for an error."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

    logger.error(_MEMORY)
    return ReleaseMemoryOccupationReqOutput()


def reject_resume(_manager: Any, _request: Any) -> Any:
    """In place of `SchedulerWeightUpdaterManager.resume_memory_occupation`."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    logger.error(_MEMORY)
    return ResumeMemoryOccupationReqOutput()


def reject_rpc(_scheduler: Any, request: Any) -> Any:
    """In place of `Scheduler.handle_rpc_request`: saving weights, and whatever else `Engine.collective_rpc` names.

    It ends with a barrier of all ranks, and only one of them gets the request.
    """
    from sglang.srt.managers.io_struct import RpcReqOutput

    return RpcReqOutput(success=False, message=f"{request.method} is {_REASON}")


def _is_dwdp(manager: Any) -> bool:
    # These hooks stay in the launcher's process, which may start another engine without DWDP later.
    return config_of(manager.server_args) is not None


async def explain_memory(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the tokenizer manager's `release_memory_occupation` and `resume_memory_occupation`."""
    if _is_dwdp(manager):
        raise ValueError(_MEMORY)
    return await original(manager, *args, **kwargs)


async def explain_weights(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the tokenizer manager's `get_weights_by_name`, which would answer with nothing."""
    if _is_dwdp(manager):
        raise ValueError(_EXPORT)
    return await original(manager, *args, **kwargs)


async def explain_sending(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the tokenizer manager's requests to send weights to another server, which assert that there is one
    rank."""
    if _is_dwdp(manager):
        return False, _EXPORT
    return await original(manager, *args, **kwargs)


_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_SCHEDULERS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
SCHEDULER_HOOKS = (
    Hook(f"{_UPDATER}.init_weights_update_group", HookType.REPLACE, reject_group),
    Hook(f"{_SCHEDULERS}.begin_weight_update", HookType.REPLACE, reject_begin),
    Hook(f"{_SCHEDULERS}.check_weights", HookType.REPLACE, reject_check),
    Hook(f"{_SCHEDULERS}.release_memory_occupation", HookType.REPLACE, reject_release),
    Hook(f"{_SCHEDULERS}.resume_memory_occupation", HookType.REPLACE, reject_resume),
    Hook("sglang.srt.managers.scheduler.Scheduler.handle_rpc_request", HookType.REPLACE, reject_rpc),
)
TOKENIZER_HOOKS = (
    Hook(f"{_MANAGER}.release_memory_occupation", HookType.AROUND, explain_memory),
    Hook(f"{_MANAGER}.resume_memory_occupation", HookType.AROUND, explain_memory),
    Hook(f"{_MANAGER}.get_weights_by_name", HookType.AROUND, explain_weights),
    Hook(f"{_MANAGER}.init_weights_send_group_for_remote_instance", HookType.AROUND, explain_sending),
    Hook(f"{_MANAGER}.send_weights_to_remote_instance", HookType.AROUND, explain_sending),
)
