"""Weights are fixed while a server runs: peers read them in place, and layers are bound to slots.

SGLang's models can declare that theirs cannot be updated or exported, which every front end's requests meet in the
ranks. Hooks are for what SGLang does without asking, and for answers that would have no reason in them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers import io_struct
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


def reject_rpc(_scheduler: Any, request: Any) -> Any:
    """In place of `Scheduler.handle_rpc_request`: saving weights, and whatever else `Engine.collective_rpc` names.

    It ends with a barrier of all ranks, and only one of them gets the request.
    """
    return io_struct.RpcReqOutput(success=False, message=f"{request.method} is {_REASON}")


def _rejecting(output: Callable[..., Any], reason: str, *, in_answer: bool = True) -> Callable[[Any, Any], Any]:
    """In place of a method of `SchedulerWeightUpdaterManager`: the reason in its answer, or in the log without room."""

    def reject(_manager: Any, _request: Any) -> Any:
        if in_answer:
            return output(success=False, message=reason)
        logger.error(reason)
        return output()

    return reject


reject_begin = _rejecting(io_struct.BeginWeightUpdateReqOutput, _UPDATE)  # which other updates want first
reject_check = _rejecting(io_struct.CheckWeightsReqOutput, _EXPORT)  # what it would read or reset may be a slot
reject_release = _rejecting(io_struct.ReleaseMemoryOccupationReqOutput, _MEMORY, in_answer=False)
reject_resume = _rejecting(io_struct.ResumeMemoryOccupationReqOutput, _MEMORY, in_answer=False)


def _explaining(reason: str, *, in_answer: bool = False) -> Callable[..., Any]:
    """Around a request to the tokenizer manager that ranks would answer with no reason, or not at all."""

    async def explain(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
        # The hook stays in the launcher's process, which may start another engine without DWDP later.
        if config_of(manager.server_args) is None:
            return await original(manager, *args, **kwargs)
        if in_answer:
            return False, reason
        raise ValueError(reason)

    return explain


explain_memory, explain_weights = _explaining(_MEMORY), _explaining(_EXPORT)
explain_sending = _explaining(_EXPORT, in_answer=True)  # which asserts that there is one rank

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
