"""ModelRunner: where the runtime is set up, and what runs around every forward."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
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
from sglang_dwdp.srt_patches.experts import collect, rank_in_group
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


def set_up(runner: Any) -> None:
    """In place of `ModelRunner.maybe_init_dwdp`, which runs after the weights are loaded and post-processed, and
    before the KV cache is sized."""
    if runner.is_draft_worker:
        return
    config = config_of(runner.server_args)
    assert config is not None
    check_loaded(runner.model)
    layers = collect(runner.model, runner.device)
    parallel = get_parallel()
    index = torch.cuda.current_device() if runner.device == "cuda" else 0
    memory = memory_for(runner.device, index, config.transport, across_hosts=hosts.is_group_across())
    runtime = DwdpRuntime(config, memory, rank_in_group(), parallel.dwdp_size)
    group = parallel.tp_rank // parallel.dwdp_size
    server = _common_name(parallel.tp_group)
    name = f"{server}.{group}"
    hosts.check_weights(runner.model)
    runtime.setup(layers, name, hosts.place_of_group())
    hosts.watch()
    set_global_dwdp_manager(Manager(runtime))
    if config.exchange == "auto":
        from sglang_dwdp.srt_patches import exchange

        exchange.set_up(runtime, runner, name)
    updates.set_up(runtime, runner.model, server)
    declare_unexportable(runner.model)
    views = config.views(maps=memory.maps)
    if views.direct and views.staged:
        logger.info("DWDP reads experts in place in forwards of up to %d tokens.", views.max_tokens)
    if runner.device == "cuda":
        # Without chunks (--chunked-prefill-size -1) a prefill is as large as the scheduler makes it.
        flashinfer_fp8.warm_up(runner.model, max(1, max_prefill_buffer_tokens() or get_schedule().max_prefill_tokens))


def _common_name(group: Any) -> str:
    """A name that the ranks of `group` agree on and no other server on the host has."""
    name = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(name, src=group.ranks[0], group=group.cpu_group)
    return name[0]


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.forward`."""
    if runner.is_draft_worker:
        return original(runner, forward_batch, *args, **kwargs)
    runtime = current_runtime()
    num_tokens = forward_batch._forward_num_tokens()
    runtime.begin_forward(num_tokens)
    try:
        output = original(runner, forward_batch, *args, **kwargs)
    except BaseException:
        runtime.abort_forward()
        raise
    runtime.end_forward(num_tokens, replayed=output.can_run_graph)
    return output


HOOKS = (
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.maybe_init_dwdp", HookType.REPLACE, set_up),
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", HookType.AROUND, forward),
)
