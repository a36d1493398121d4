"""Which hooks each process of a server gets, once it knows that DWDP is on.

The first thing that every process of SGLang does is to publish the server arguments, under its role.
"""

from __future__ import annotations

import sys
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpError
from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook, install
from sglang_dwdp.support.ledger import check_sources


def install_for_role(_result: Any, server_args: Any, *_args: Any, role: str, **_kwargs: Any) -> None:
    """After `runtime_context.publish`.

    Raises:
        DwdpConfigError: What is to be hooked is not the supported release's.
        DwdpRuntimeError: A hook could not be put in place.

    After either, the process ends, and SGLang ends the server.
    """
    config = config_of(server_args)
    if config is None:
        return
    try:
        # The attribute is what the user gave; what SGLang found instead of nothing is in the resolved arguments.
        _install(role, config, resolving_view(server_args).device)
    except DwdpError as error:
        # At once: SGLang ends the server as soon as this process closes its pipe, before a traceback is out.
        sys.stderr.write(f"sglang-dwdp: error: {error}\n")
        sys.stderr.flush()
        raise


def _install(role: str, config: DwdpConfig, device: str | None) -> None:
    hooks = _hooks(role, config, device)
    if not hooks:
        return
    check_sources({hook.target for hook in hooks})  # all of them, before the first is replaced
    if role == "scheduler":
        from sglang_dwdp.srt_patches import collectives, experts

        if device == "cuda":
            from sglang_dwdp.srt_patches import flashinfer_fp8
            from sglang_dwdp.support import flashinfer_modules

            flashinfer_modules.install()  # before weights are loaded: FlashInfer prepares MXFP4 weights with its module
            flashinfer_fp8.register()
        experts.install_shard_count()
        collectives.guard_collectives(device)
    install(hooks)


def _hooks(role: str, config: DwdpConfig, device: str | None) -> tuple[Hook, ...]:
    """What a process of this role hooks, in the order of installation."""
    if role == "scheduler":
        from sglang_dwdp.srt_patches import (
            experts,
            first_forward,
            forward,
            hosts,
            linear,
            load_lock,
            loading,
            lost_rank,
            metrics,
            recorder,
            reports,
            sessions,
            steps,
            update_hooks,
            weights,
        )

        hooks = [*linear.HOOKS, *steps.HOOKS, *experts.HOOKS, *loading.HOOKS, *forward.HOOKS, *first_forward.HOOKS]
        hooks += hosts.HOOKS
        hooks += (*reports.SCHEDULER_HOOKS, *weights.SCHEDULER_HOOKS, *update_hooks.HOOKS)
        hooks += (*sessions.SCHEDULER_HOOKS, *recorder.SCHEDULER_HOOKS, *metrics.HOOKS, *load_lock.HOOKS)
        if config.outlives_ranks:
            hooks += lost_rank.OUTLIVED_HOOKS
        if device == "cuda":
            from sglang_dwdp.srt_patches import flashinfer_fp8, prefill_graphs

            hooks = [*flashinfer_fp8.HOOKS, *prefill_graphs.HOOKS, *steps.GPU_HOOKS, *hooks]
        if config.exchange != "off":
            from sglang_dwdp.srt_patches import exchange, exchange_graphs, exchange_results

            hooks += (*exchange.HOOKS, *exchange_results.HOOKS, *(exchange_graphs.HOOKS if device == "cuda" else ()))
        return (*hooks, *(experts.AUDIT_HOOKS if config.audit else ()))
    if role == "dp_controller":
        from sglang_dwdp.srt_patches import controller, load_lock, ports, rank_traffic, reports, sessions

        hooks = [*controller.HOOKS, *ports.HOOKS, *reports.CONTROLLER_HOOKS, *sessions.CONTROLLER_HOOKS]
        return (*hooks, *rank_traffic.HOOKS, *load_lock.HOOKS)
    if role == "tokenizer":
        from sglang_dwdp.srt_patches import load_lock, lost_rank, ports, rank_watch, recorder, weights

        hooks = [*weights.TOKENIZER_HOOKS, *recorder.TOKENIZER_HOOKS, *lost_rank.TOKENIZER_HOOKS, *ports.HOOKS]
        return (*hooks, *rank_watch.HOOKS, *load_lock.HOOKS)
    return ()


HOOKS = (Hook("sglang.srt.runtime_context.publish", HookType.AFTER, install_for_role),)
