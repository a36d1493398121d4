"""What --enable-dwdp resolves in SGLang's arguments, as overridden resolution steps."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.utils.network import NetworkAddress

from sglang_dwdp.config import TRANSPORTS, DwdpConfig, transports_of
from sglang_dwdp.cpu import engine as cpu_engine
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.direct_limit import direct_limit
from sglang_dwdp.experts.placement import balanced, check_local_experts
from sglang_dwdp.srt_patches import arguments, install, moe_backend
from sglang_dwdp.srt_patches.arguments import errors_in_one_line
from sglang_dwdp.srt_patches.attached import attach_config, config_of
from sglang_dwdp.srt_patches.final_check import check_resolved, declared_by
from sglang_dwdp.srt_patches.graphs import check_graph_backends, graph_arguments
from sglang_dwdp.srt_patches.resolved import RESOLVED
from sglang_dwdp.support import models
from sglang_dwdp.support.conflicts import check_conflicts, check_environment
from sglang_dwdp.support.ledger import check_sources
from sglang_dwdp.support.quantization import check_quantization
from sglang_dwdp.support.release import check_release

logger = logging.getLogger(__name__)

_SOURCE = "sglang_dwdp"
_CONNECT_S = 2.0


def resolve_dwdp(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_dwdp`.

    SGLang's own step is left out where DWDP is on: it shards experts by expert parallelism and turns CUDA
    graphs off. What both share (SGLang removes collectives where dwdp_size > 1) is declared here.
    """
    config = config_of(server_args)
    if config is None:
        previous(server_args)
        return
    view = resolving_view(server_args)
    with errors_in_one_line(server_args):
        check_release()
        # What the launcher uses; each process checks its own when it starts (see install.py).
        check_sources({hook.target for hook in (*arguments.HOOKS, *install.HOOKS)})
        check_environment(os.environ)
        check_conflicts(view)
        group_size = _group_size(config, view)
        model = model_config_of(server_args)
        num_experts = _check_model(config, model, view.model_path, group_size)
        _check_device(config, view.device)
        if view.device == "cuda" and view.speculative_algorithm:
            logger.warning(
                "DWDP: --speculative-algorithm %s has been validated on the CPU engine alone. Compare some answers "
                "with a server without --enable-dwdp first.",
                view.speculative_algorithm,
            )
        if view.device == "cuda":
            check_quantization(model.quantization, moe_backend.quantization_config(model))
        _check_hosts(config, view, group_size)
        check_graph_backends(view)
        if config.exchange != "off" and view.disaggregation_mode == "prefill":
            raise DwdpConfigError(
                f"--dwdp-exchange {config.exchange} is for servers that decode: drop it with "
                "--disaggregation-mode prefill."
            )
        elif config.exchange != "off" and view.speculative_algorithm:
            raise DwdpConfigError(
                f"--enable-dwdp cannot be used here: --dwdp-exchange {config.exchange} with --speculative-algorithm "
                f"{view.speculative_algorithm} is unsupported, since ranks decode one token a sequence together. Drop "
                "one of them."
            )
        elif config.exchange == "off" and view.disaggregation_mode != "prefill":
            logger.info(
                "DWDP: every rank decodes alone. With --dwdp-exchange auto ranks run decodes and short prefills "
                "together: two H100 then served 4 times as many requests of 1k tokens with 256 new ones "
                "(docs/performance.md)."
            )
    config = with_direct_limit(config, num_experts, models.experts_per_token(model.hf_text_config))
    attach_config(server_args, config)
    declare_resolution(server_args, _SOURCE, dwdp_size=group_size, attn_dp_size=view.tp_size, **RESOLVED)
    backend = moe_backend.choose(server_args, view)
    if backend is not None:
        declare_resolution(server_args, _SOURCE, moe_runner_backend=backend)
    if view.device == "cpu":
        # An idle rank would spin on a core, and on a CPU the busy ranks compute with those.
        # And custom all-reduce, which is for GPUs, would be tried and warned of.
        declare_resolution(server_args, _SOURCE, sleep_on_idle=True, disable_custom_all_reduce=True)
    declare_resolution(server_args, _SOURCE, **graph_arguments(view, has_direct=config.views().direct))
    if config.exchange != "off":
        # A rank that prefills is missing from its peers' joint steps, so its own decodes ride along. What that costs
        # prefills is in docs/performance.md.
        declare_resolution(server_args, _SOURCE, enable_mixed_chunk=True)


def with_direct_limit(config: DwdpConfig, num_experts: int, experts_per_token: int | None) -> DwdpConfig:
    """`config` with --dwdp-direct-max-tokens resolved, in the launcher, so that all ranks have the same."""
    if config.direct_max_tokens is not None:
        return config
    limit = direct_limit(num_experts, experts_per_token)
    chosen = "an unknown number" if experts_per_token is None else experts_per_token
    logger.info("DWDP: --dwdp-direct-max-tokens is %d: a token chooses %s of %d experts.", limit, chosen, num_experts)
    return dataclasses.replace(config, direct_max_tokens=limit)


def _group_size(config: DwdpConfig, view: Any) -> int:
    size = config.group_size or view.tp_size
    if view.tp_size % size:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: --tp-size {view.tp_size} is not a multiple of --dwdp-group-size "
            f"{size}. Every rank belongs to one group: choose a group size that divides the number of ranks."
        )
    return int(size)


def _check_model(config: DwdpConfig, model: Any, path: str, group_size: int) -> int:
    """The model's number of routed experts, if it can be shared among the ranks."""
    warning = models.check(getattr(model.hf_config, "architectures", None))
    if warning is not None:
        logger.warning("DWDP: %s", warning)
    num_experts = models.expert_count(model.hf_text_config)
    if num_experts is None:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: {path} has no routed experts (its config has none of "
            f"{', '.join(models.EXPERT_COUNT_KEYS)}), so there is nothing to share. Use --dp-size for a dense model."
        )
    balanced(num_experts, group_size)
    check_local_experts(config.local_experts, num_experts, group_size)
    return num_experts


def _check_device(config: DwdpConfig, device: str) -> None:
    transports = transports_of(device)
    if not transports:
        devices = dict.fromkeys(kind.device for kind in TRANSPORTS.values())
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: --device {device} has no memory that ranks can share. "
            f"Use one of {', '.join(devices)}."
        )
    if config.transport not in ("auto", *transports):
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: --dwdp-transport {config.transport} on --device {device}. "
            f"Use {' or '.join(transports)}, or leave the option out."
        )


def _check_hosts(config: DwdpConfig, view: Any, group_size: int) -> None:
    if view.nnodes == 1:
        return
    if view.dist_init_addr is None or view.tp_size % view.nnodes:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: --nnodes {view.nnodes} needs --dist-init-addr, an address of the "
            f"first host, and a --tp-size that is a multiple of the hosts (got {view.tp_size})."
        )
    own = view.tp_size // view.nnodes
    starts = range(0, view.tp_size, group_size)
    if any(first // own != (first + group_size - 1) // own for first in starts):
        transports = transports_of(view.device, across_hosts=True)
        way_out = f"Use a --dwdp-group-size that divides {own}, the ranks of a host"
        if config.transport not in ("auto", *transports):
            raise DwdpConfigError(
                f"--enable-dwdp cannot be used here: --dwdp-transport {config.transport} does not cross hosts. "
                f"{way_out}, or {' or '.join(transports)}."
            )
        if config.exchange != "off":
            raise DwdpConfigError(
                f"--enable-dwdp cannot be used here: with --dwdp-exchange {config.exchange} the ranks of a group have "
                f"to be on one host. {way_out}, or drop --dwdp-exchange."
            )
    there = NetworkAddress.parse(view.dist_init_addr)
    with suppress(OSError), socket.create_connection((there.host, there.port), _CONNECT_S):
        # The ranks listen there once all hosts have come, so this host would be one too many.
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: a server is running at --dist-init-addr {view.dist_init_addr} "
            "already. Choose another port, the same on all hosts."
        )


def resolve_data_parallelism(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_data_parallelism`: keep what a rank may do at a time.

    For dp-attention SGLang divides chunked_prefill_size (and with it the sizes of prefill graphs) by the ranks and
    lowers schedule_conservativeness, since all ranks' tokens meet in one MoE batch. A DWDP rank's tokens are a batch of
    their own.
    """
    if config_of(server_args) is None:
        previous(server_args)
        return
    view = resolving_view(server_args)
    kept = {
        "chunked_prefill_size": view.chunked_prefill_size,
        "schedule_conservativeness": view.schedule_conservativeness,
        "cuda_graph_config": view.cuda_graph_config,
    }
    previous(server_args)
    declare_resolution(server_args, _SOURCE, **kept)


def resolve_load_balance(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_load_balance_method`: requests go to the rank with the fewest pending tokens.

    SGLang's default counts requests (and on a prefill server takes the rank from the request's number). Ranks that
    run in step lose little by that, since each waits for the slowest anyway. DWDP ranks do not wait for each other,
    so nothing but a rank that got the long prompts makes requests wait.
    """
    if config_of(server_args) is not None and resolving_view(server_args).load_balance_method == "auto":
        declare_resolution(server_args, _SOURCE, load_balance_method="total_tokens")
    previous(server_args)


def resolve_last(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `validate_deepep_v2_dispatch_token_budget`, the last one of all."""
    previous(server_args)
    if config_of(server_args) is not None:
        with errors_in_one_line(server_args):
            check_resolved(resolving_view(server_args), declared_by(server_args, _SOURCE))


def resolve_cpu_backends(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_cpu_backends`: SGLang's default needs kernels for AMX."""
    view = resolving_view(server_args)
    if config_of(server_args) is not None and view.device == "cpu" and view.attention_backend is None:
        declare_resolution(server_args, _SOURCE, attention_backend=cpu_engine.default_flags()["attention_backend"])
    previous(server_args)


def resolve_memory(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_gpu_memory_settings`: a fixed size for the KV cache on the CPU engine.

    There SGLang lets every rank take the share of the host's memory that the only user of a device would. A size that
    the user set stays.
    """
    view = resolving_view(server_args)
    unset = view.max_total_tokens is None and view.mem_fraction_static is None
    previous(server_args)
    if config_of(server_args) is not None and view.device == "cpu" and unset:
        declare_resolution(server_args, _SOURCE, max_total_tokens=cpu_engine.default_flags()["max_total_tokens"])


def register_resolution() -> None:
    """Register the resolution steps, SGLang's official way to override them."""
    register_resolution_hook("handle_dwdp")(resolve_dwdp)
    register_resolution_hook("handle_data_parallelism")(resolve_data_parallelism)
    register_resolution_hook("handle_load_balance_method")(resolve_load_balance)
    register_resolution_hook("validate_deepep_v2_dispatch_token_budget")(resolve_last)
    register_resolution_hook("handle_cpu_backends")(resolve_cpu_backends)
    register_resolution_hook("handle_gpu_memory_settings")(resolve_memory)
