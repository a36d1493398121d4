"""Which hooks each process of a server gets, once it knows that DWDP is on.

The first thing that every process of SGLang does is to publish the server arguments, under its role.
"""

from __future__ import annotations

import sys
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook, install


def install_for_role(_result: Any, server_args: Any, *_args: Any, role: str, **_kwargs: Any) -> None:
    """After `runtime_context.publish`.

    Raises:
        DwdpRuntimeError: a hook could not be put in place. The process ends, and SGLang ends the server.
    """
    config = config_of(server_args)
    if config is None:
        return
    try:
        # The attribute is what the user gave; what SGLang found instead of nothing is in the resolved arguments.
        _install(role, config, resolving_view(server_args).device)
    except DwdpRuntimeError as error:
        # At once: SGLang ends the server as soon as this process closes its pipe, before a traceback is out.
        sys.stderr.write(f"sglang-dwdp: error: {error}\n")
        sys.stderr.flush()
        raise


def _install(role: str, config: DwdpConfig, device: str | None) -> None:
    if role == "scheduler":
        from sglang_dwdp.srt_patches import (
            collectives,
            experts,
            first_forward,
            forward,
            linear,
            loading,
            metrics,
            recorder,
            reports,
            sessions,
            steps,
            weights,
        )

        if device == "cuda":
            from sglang_dwdp.srt_patches import flashinfer_fp8, prefill_graphs
            from sglang_dwdp.support import flashinfer_modules

            flashinfer_modules.install()  # before weights are loaded: FlashInfer prepares MXFP4 weights with its module
            flashinfer_fp8.register()
            install((*flashinfer_fp8.HOOKS, *prefill_graphs.HOOKS))

        experts.install_shard_count()
        install((*linear.HOOKS, *steps.HOOKS, *experts.HOOKS, *loading.HOOKS, *forward.HOOKS))
        install((*first_forward.HOOKS, *reports.SCHEDULER_HOOKS, *weights.SCHEDULER_HOOKS))
        install((*sessions.SCHEDULER_HOOKS, *recorder.SCHEDULER_HOOKS, *metrics.HOOKS))
        collectives.guard_collectives(device)
        if config.exchange == "auto":
            from sglang_dwdp.srt_patches import exchange

            install(exchange.HOOKS)
            if device == "cuda":
                install(exchange.GPU_HOOKS)
        if config.audit:
            install(experts.AUDIT_HOOKS)
    elif role == "dp_controller":
        from sglang_dwdp.srt_patches import controller, ports, reports, sessions

        install((*controller.HOOKS, *ports.HOOKS, *reports.CONTROLLER_HOOKS, *sessions.CONTROLLER_HOOKS))
    elif role == "tokenizer":
        from sglang_dwdp.srt_patches import lost_rank, ports, recorder, weights

        install((*weights.TOKENIZER_HOOKS, *recorder.TOKENIZER_HOOKS))
        install((*lost_rank.TOKENIZER_HOOKS, *ports.HOOKS))


HOOKS = (Hook("sglang.srt.runtime_context.publish", HookType.AFTER, install_for_role),)
