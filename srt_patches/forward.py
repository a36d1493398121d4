"""ModelRunner: where the runtime is set up, and what runs around every forward."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import (
    get_global_dwdp_manager,
    get_parallel,
    get_schedule,
    max_prefill_buffer_tokens,
    set_global_dwdp_manager,
)

from sglang_dwdp.memory import memory_for
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches import flashinfer_fp8, hosts, updates
from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.experts import collect_all, group_number, rank_in_group
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.loading import check_loaded
from sglang_dwdp.srt_patches.weights import declare_unexportable

logger = logging.getLogger(__name__)


class Manager:
    """The runtime under the names by which SGLang calls its own DWDP manager."""

    def __init__(self, runtime: DwdpRuntime) -> None:
        self.runtime = runtime
        # Bound methods as attributes: a forward pays for no second call.
        self.prefetch_first_layers = runtime.prime
        self.wait_prefetch = runtime.wait
        self.record_compute_and_prefetch_next = runtime.release
        self.cleanup = runtime.close


def current_runtime() -> DwdpRuntime:
    """The runtime of this process."""
    manager = get_global_dwdp_manager()
    assert isinstance(manager, Manager)
    return manager.runtime


def check_arrived(runner: Any) -> None:
    """In place of `ModelRunner.maybe_init_dwdp`, which runs after a model's weights are loaded and post-processed."""
    check_loaded(runner.model)


def set_up(_result: None, scheduler: Any) -> None:
    """After `Scheduler.maybe_init_draft_worker`: the model and its draft model, if there is one, have their weights,
    and the KV cache is sized next."""
    runner = scheduler.tp_worker.model_runner
    draft_runners = scheduler.draft_worker.weight_update_runners() if scheduler.draft_worker else ()
    drafts = [draft.model for _, draft in draft_runners]
    config = config_of(runner.server_args)
    assert config is not None
    layers = collect_all(runner.model, drafts, runner.device)
    parallel = get_parallel()
    index = torch.cuda.current_device() if runner.device == "cuda" else 0
    memory = memory_for(runner.device, index, config.transport, across_hosts=hosts.is_group_across())
    runtime = DwdpRuntime(config, memory, rank_in_group(), parallel.dwdp_size)
    server = _common_name(parallel.tp_group)
    name = f"{server}.{group_number()}"
    hosts.check_weights(runner.model)
    draft_layers = sum(isinstance(module, FusedMoE) for draft in drafts for module in draft.modules())
    runtime.setup(layers, name, hosts.place_of_group(), draft_layers=draft_layers)
    hosts.watch()
    set_global_dwdp_manager(Manager(runtime))
    if config.exchange != "off":
        from sglang_dwdp.srt_patches import exchange

        exchange.set_up(runtime, runner, name)
    updates.set_up(runtime, runner.model, server, has_draft=bool(drafts))
    for model in (runner.model, *drafts):
        declare_unexportable(model)
    views = config.views(maps=memory.maps)
    if views.direct and views.staged:
        logger.info("DWDP reads experts in place in forwards of up to %d tokens.", views.max_tokens)
    if runner.device == "cuda":
        # Without chunks (--chunked-prefill-size -1) a prefill is as large as the scheduler makes it.
        most = max(1, max_prefill_buffer_tokens() or get_schedule().max_prefill_tokens)
        for model in (runner.model, *drafts):
            flashinfer_fp8.warm_up(model, most)


def _common_name(group: Any) -> str:
    """A name that the ranks of `group` agree on and no other server on the host has."""
    name = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(name, src=group.ranks[0], group=group.cpu_group)
    return name[0]


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.forward`."""
    if runner.is_draft_worker and get_is_capture_mode():
        # A draft's decode graph holds several of its forwards. As with any, layers rest bound to their direct views.
        return original(runner, forward_batch, *args, **kwargs)
    runtime = current_runtime()
    num_tokens = forward_batch._forward_num_tokens()
    runtime.begin_forward(num_tokens, draft=runner.is_draft_worker)
    try:
        output = original(runner, forward_batch, *args, **kwargs)
    except BaseException:
        runtime.abort_forward()
        raise
    runtime.end_forward(num_tokens, replayed=output.can_run_graph)
    return output


HOOKS = (
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.maybe_init_dwdp", HookType.REPLACE, check_arrived),
    Hook("sglang.srt.managers.scheduler.Scheduler.maybe_init_draft_worker", HookType.AFTER, set_up),
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", HookType.AROUND, forward),
)
