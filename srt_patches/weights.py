"""Online changes of the weights, which peers read in place: answered with an error, and the server goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook

_REASON = (
    "not supported with --enable-dwdp: other ranks read these weights in place. "
    "Restart the server with the new weights, or serve without --enable-dwdp."
)


def refuse_update(_updater: Any, *_args: Any, **_kwargs: Any) -> tuple[bool, str]:
    """In place of `WeightUpdater`'s methods, on every rank alike, so SGLang's barriers still match."""
    return False, f"Updating weights is {_REASON}"


def refuse_rpc(_scheduler: Any, request: Any) -> Any:
    """In place of `Scheduler.handle_rpc_request`: saving weights, and whatever else `Engine.collective_rpc` names.

    It ends with a barrier of all ranks, and only one of them gets the request; and what layers are bound to after a
    staged forward is not their own weights.
    """
    from sglang.srt.managers.io_struct import RpcReqOutput

    return RpcReqOutput(success=False, message=f"{request.method} is {_REASON}")


def _is_dwdp(manager: Any) -> bool:
    # These hooks stay in the launcher's process, which may start another engine without DWDP later.
    return config_of(manager.server_args) is not None


async def refuse_request(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the tokenizer manager's requests that would change something on the ranks."""
    if _is_dwdp(manager):
        return False, f"Updating weights is {_REASON}"
    return await original(manager, *args, **kwargs)


async def refuse_disk_update(
    original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
) -> tuple[bool, str, int]:
    """Around the tokenizer manager's `update_weights_from_disk`, before it aborts or holds up requests for it."""
    if _is_dwdp(manager):
        return False, f"Updating weights is {_REASON}", 0
    answer: tuple[bool, str, int] = await original(manager, *args, **kwargs)
    return answer


async def refuse_release(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the tokenizer manager's `release_memory_occupation` and `resume_memory_occupation`."""
    if _is_dwdp(manager):
        raise ValueError(f"Releasing and resuming memory is {_REASON}")
    return await original(manager, *args, **kwargs)


async def refuse_reset(original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the tokenizer manager's `check_weights`, one action of which overwrites the weights."""
    if obj.action == "reset_tensors" and _is_dwdp(manager):
        return False, f"Resetting weights is {_REASON}", None, None
    return await original(manager, obj, *args, **kwargs)


_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
SCHEDULER_HOOKS = (
    *(
        Hook(f"{_UPDATER}.{method}", HookType.REPLACE, refuse_update)
        for method in (
            "init_weights_update_group",
            "update_weights_from_disk",
            "update_weights_from_ipc",
            "update_weights_from_tensor",
        )
    ),
    Hook("sglang.srt.managers.scheduler.Scheduler.handle_rpc_request", HookType.REPLACE, refuse_rpc),
)
TOKENIZER_HOOKS = (
    Hook(f"{_MANAGER}.begin_weight_update", HookType.AROUND, refuse_request),
    Hook(f"{_MANAGER}.end_weight_update", HookType.AROUND, refuse_request),
    *(
        Hook(f"{_MANAGER}.update_weights_from_{source}", HookType.AROUND, refuse_request)
        for source in ("distributed", "ipc", "tensor")
    ),
    Hook(f"{_MANAGER}.update_weights_from_disk", HookType.AROUND, refuse_disk_update),
    Hook(f"{_MANAGER}.check_weights", HookType.AROUND, refuse_reset),
    Hook(f"{_MANAGER}.release_memory_occupation", HookType.AROUND, refuse_release),
    Hook(f"{_MANAGER}.resume_memory_occupation", HookType.AROUND, refuse_release),
)
