"""Requests that read a running server's weights, save them, or release their memory; `updates.py` has those that
change them.

A rank's tensors of all experts are other ranks' memory for the most part, or slots. So what reads them has to choose,
what saves them is answered with an error, and all ranks release them together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.managers import io_struct
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.updates import current_updates

logger = logging.getLogger(__name__)

_DEVICE_MODULE = "get_device_module"
_UNSUPPORTED = "unsupported with --enable-dwdp"
_EXPORT = (
    f"Saving or sending a running server's weights is {_UNSUPPORTED}: a rank stores a part of them and reads the rest "
    "from its peers. Take them from where they were trained, or serve without --enable-dwdp."
)
_MEMORY = (
    f"Releasing and resuming the memory of weights is {_UNSUPPORTED} on several hosts, with --speculative-algorithm, "
    "and with --dwdp-transport cuda-ipc, whose addresses cannot be had again. Release the rest with tags "
    '["kv_cache", "cuda_graph"].'
)


def declare_unexportable(model: torch.nn.Module) -> None:
    """Let SGLang answer requests that would save or send this model's weights with an error."""
    vars(model)["_weight_export_error"] = _EXPORT


def reject_rpc(_scheduler: Any, request: Any) -> Any:
    """In place of `Scheduler.handle_rpc_request`: saving weights, and whatever else `Engine.collective_rpc` names.

    It ends with a barrier of all ranks, and only one of them gets the request.
    """
    return io_struct.RpcReqOutput(success=False, message=f"{request.method}: {_EXPORT}")


def read_by_name(exporter: Any, name: str, truncate_size: int = 100) -> Any:
    """In place of `WeightExporter.get_weights_by_name`, which few models with experts answer.

    Args:
        exporter: SGLang's.
        name: A parameter's, as SGLang's model has it: of all experts together, for instance.
        truncate_size: How much of its first dimension is read.

    Returns:
        Its values, as nested lists; None where there is no such parameter.
    """
    try:
        with current_updates().runtime.reading():
            parameter = dict(exporter.get_model().named_parameters())[name]
            # By a kernel: a copy engine's copy must not touch the memory of two GPUs.
            return parameter.detach()[:truncate_size].to(torch.float64).cpu().tolist()
    except KeyError:
        why = "there is no such parameter; names are those of SGLang's model, such as model.norm.weight"
    except DwdpRuntimeError as error:
        why = str(error)
    logger.error("%s cannot be read: %s", name, why)
    return None


def concerns_weights(request: Any) -> bool:
    """Whether a request to release or resume memory names that of weights, as one without tags does."""
    return not request.tags or GPU_MEMORY_TYPE_WEIGHTS in request.tags


def release_memory(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around `SchedulerWeightUpdaterManager.release_memory_occupation`, which checks that nothing runs, and waits for
    all ranks. SGLang's memory saver does not know of the memory that ranks share."""
    runtime = current_updates().runtime
    with _device_module(runtime):
        answer = original(manager, request)
    if concerns_weights(request) and not runtime.weights.is_released:
        runtime.weights.release()
    return answer


@contextmanager
def _device_module(runtime: DwdpRuntime) -> Iterator[None]:
    """On the CPU engine SGLang waits for the GPU, which a build of torch for GPUs looks for in vain."""
    if runtime.weights.on_gpu:
        yield
        return
    kept: Any = torch.get_device_module
    setattr(torch, _DEVICE_MODULE, lambda _device=None: torch.cpu)
    try:
        yield
    finally:
        setattr(torch, _DEVICE_MODULE, kept)


def resume_memory(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around `SchedulerWeightUpdaterManager.resume_memory_occupation`. As in SGLang, weights have to be updated then.

    Raises:
        DwdpError: This rank or a peer cannot have its memory again: the server ends.
    """
    runtime = current_updates().runtime
    if concerns_weights(request) and runtime.weights.is_released:
        with current_updates().meeting(of_group=True) as exchange:
            runtime.weights.restore(exchange)
    return original(manager, request)


async def explain_memory(original: Callable[..., Any], manager: Any, request: Any, *args: Any) -> Any:
    """Around a request to the tokenizer manager that ranks would answer with no reason."""
    # The hook stays in the launcher's process, which may start another engine without DWDP later.
    config = config_of(manager.server_args)
    if config is None or not concerns_weights(request):
        return await original(manager, request, *args)
    arguments = manager.server_args
    if config.transport == "cuda-ipc" or arguments.nnodes > 1 or arguments.speculative_algorithm:
        raise ValueError(_MEMORY)
    return await original(manager, request, *args)


async def explain_reading(original: Callable[..., Any], manager: Any, request: Any, *args: Any) -> Any:
    """Around a request to the tokenizer manager, whose answer has nothing of each rank where all failed."""
    found = await original(manager, request, *args)
    if config_of(manager.server_args) is not None and not any(found):
        raise ValueError(f"{request.name} cannot be read; the log says why.")
    return found


async def explain_sending(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a request to the tokenizer manager that asserts that there is one rank."""
    if config_of(manager.server_args) is not None:
        return False, _EXPORT
    return await original(manager, *args, **kwargs)


_EXPORTER = "sglang.srt.model_executor.model_runner_components.weight_exporter.WeightExporter"
_SCHEDULERS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
SCHEDULER_HOOKS = (
    Hook(f"{_EXPORTER}.get_weights_by_name", HookType.REPLACE, read_by_name),
    Hook(f"{_SCHEDULERS}.release_memory_occupation", HookType.AROUND, release_memory),
    Hook(f"{_SCHEDULERS}.resume_memory_occupation", HookType.AROUND, resume_memory),
    Hook("sglang.srt.managers.scheduler.Scheduler.handle_rpc_request", HookType.REPLACE, reject_rpc),
)
TOKENIZER_HOOKS = (
    Hook(f"{_MANAGER}.release_memory_occupation", HookType.AROUND, explain_memory),
    Hook(f"{_MANAGER}.resume_memory_occupation", HookType.AROUND, explain_memory),
    Hook(f"{_MANAGER}.get_weights_by_name", HookType.AROUND, explain_reading),
    Hook(f"{_MANAGER}.init_weights_send_group_for_remote_instance", HookType.AROUND, explain_sending),
    Hook(f"{_MANAGER}.send_weights_to_remote_instance", HookType.AROUND, explain_sending),
)
