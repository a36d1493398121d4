"""Flags, keywords and resolution: how a server is told to use DWDP, and what that settles in its arguments."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp import config as options
from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.cpu import engine as cpu_engine
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.budget import refuse_local_experts
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.srt_patches import moe_backend
from sglang_dwdp.srt_patches.final_check import refuse_changes
from sglang_dwdp.srt_patches.graphs import graph_arguments, reject_graph_backends
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.planned import with_direct_limit
from sglang_dwdp.support import models
from sglang_dwdp.support.conflicts import refuse_conflicts
from sglang_dwdp.support.release import refuse_other_release

logger = logging.getLogger(__name__)

_SOURCE = "sglang_dwdp"
_ATTRIBUTE = "_dwdp"  # not a field of ServerArgs; SGLang carries such attributes to child processes
_FROM_COMMAND_LINE = "_dwdp_from_command_line"
_TRANSPORTS = {"cpu": ("host-shm",), "cuda": ("cuda-vmm", "cuda-ipc")}  # by device
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def config_of(server_args: Any) -> DwdpConfig | None:
    """The options attached to these server arguments; None where DWDP is off."""
    found: DwdpConfig | None = getattr(server_args, _ATTRIBUTE, None)
    return found


def add_flags(_result: None, parser: argparse.ArgumentParser) -> None:
    """After `ServerArgs.add_cli_args`; --config files are merged with what this parser knows."""
    options.add_flags(parser)


def attach_flags(server_args: Any, _cls: type, args: argparse.Namespace) -> Any:
    """After `ServerArgs.from_cli_args`, which drops what is not a field."""
    try:
        attach(server_args, options.from_options(vars(args)))
    except DwdpConfigError as error:
        _exit(error)
    setattr(server_args, _FROM_COMMAND_LINE, True)
    return server_args


def attach(server_args: Any, config: DwdpConfig | None) -> None:
    """Enable DWDP for a server that these arguments will start."""
    if config is None:
        return
    setattr(server_args, _ATTRIBUTE, config)
    if cpu_engine.needed(server_args.device):
        # Before SGLang imports anything that asks what the CPU engine may use.
        cpu_engine.arrange(server_args.tp_size)


def engine_server_args(**keywords: Any) -> Any:
    """What `sglang.Engine` builds its server arguments with: ServerArgs, and the options of DWDP beside them."""
    from sglang.srt.server_args import ServerArgs

    mine = {name: keywords.pop(name) for name in options.option_names() if name in keywords}
    server_args = ServerArgs(**keywords)
    attach(server_args, options.from_options(mine))
    return server_args


def open_engine(_result: None = None) -> None:
    """Let `sglang.Engine` take the options as keywords, through the class attribute that it has for forks.

    Runs after every `load_plugins`, which `Engine.__init__` calls first thing, because the engine's module is
    imported late and is too heavy to be imported for this.
    """
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None and hasattr(engine, "Engine"):
        engine.Engine.server_args_class = staticmethod(engine_server_args)


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
    with _one_line(server_args):
        refuse_other_release()
        refuse_conflicts(view)
        group_size = _group_size(config, view)
        _refuse_model(config, server_args, view, group_size)
        _refuse_device(config, view)
        reject_graph_backends(view)
        if config.exchange == "auto" and view.disaggregation_mode == "prefill":
            raise DwdpConfigError(
                "--dwdp-exchange auto is for servers that decode: drop it with --disaggregation-mode prefill."
            )
    setattr(server_args, _ATTRIBUTE, with_direct_limit(server_args, view, config, group_size))
    declare_resolution(
        server_args,
        _SOURCE,
        dwdp_size=group_size,
        attn_dp_size=view.tp_size,
        dp_size=1,
        # Every rank runs all experts of its tokens, so no rank is one of several in expert parallelism. Which
        # experts it stores is decided by moe_layer.py.
        ep_size=1,
        moe_dp_size=1,
        moe_a2a_backend="none",
        moe_dense_tp_size=1,
        enable_dp_lm_head=True,
        enable_dp_attention_local_control_broadcast=True,
        # A fused shared expert is one more row of the expert tensors, replicated on every rank.
        disable_shared_experts_fusion=True,
    )
    backend = moe_backend.choose(server_args, view)
    if backend is not None:
        declare_resolution(server_args, _SOURCE, moe_runner_backend=backend)
    if view.device == "cpu":
        # An idle rank would spin on a core, and on a CPU the busy ranks compute with those.
        declare_resolution(server_args, _SOURCE, sleep_on_idle=config.exchange == "off")
    declare_resolution(server_args, _SOURCE, **graph_arguments(view, has_direct=config.has_direct))


def _group_size(config: DwdpConfig, view: Any) -> int:
    size = config.group_size or view.tp_size
    if view.tp_size % size:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: --tp-size {view.tp_size} is not a multiple of --dwdp-group-size "
            f"{size}. Every rank belongs to one group: choose a group size that divides the number of ranks."
        )
    return int(size)


def _refuse_model(config: DwdpConfig, server_args: Any, view: Any, group_size: int) -> None:
    model = model_config_of(server_args)
    warning = models.check(getattr(model.hf_config, "architectures", None))
    if warning is not None:
        logger.warning("DWDP: %s", warning)
    text_config = model.hf_text_config
    counts = [getattr(text_config, name, None) for name in _EXPERT_COUNTS]
    num_experts = next((count for count in counts if isinstance(count, int) and count > 1), None)
    if num_experts is None:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: {view.model_path} has no routed experts (its config has none of "
            f"{', '.join(_EXPERT_COUNTS)}), so there is nothing to share. Use --dp-size for a dense model."
        )
    balanced(num_experts, group_size)
    refuse_local_experts(config.local_experts, num_experts, group_size)


def _refuse_device(config: DwdpConfig, view: Any) -> None:
    transports = _TRANSPORTS.get(view.device)
    if transports is None:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: --device {view.device} has no memory that ranks can share. "
            f"Use one of {', '.join(_TRANSPORTS)}."
        )
    if config.transport not in ("auto", *transports):
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: --dwdp-transport {config.transport} on --device {view.device}. "
            f"Use {' or '.join(transports)}, or leave the option out."
        )


def resolve_data_parallelism(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_data_parallelism`: keep what a rank may do at a time.

    For dp-attention SGLang divides chunked_prefill_size (and with it the sizes of prefill graphs) by the ranks and
    lowers schedule_conservativeness, since all ranks' tokens meet in one MoE batch. A DWDP rank's tokens meet nobody's.
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

    SGLang's default counts requests (and on a prefill server draws the rank from the request's number). Ranks in
    step lose little by that, since each waits for the longest anyway; a DWDP rank waits for nobody, so a rank that
    got the long prompts is the only thing left that makes requests wait.
    """
    if config_of(server_args) is not None and resolving_view(server_args).load_balance_method == "auto":
        declare_resolution(server_args, _SOURCE, load_balance_method="total_tokens")
    previous(server_args)


def resolve_last(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_elastic_ep`, which comes after all that settle parallelism and MoE exchanges."""
    previous(server_args)
    if config_of(server_args) is not None:
        with _one_line(server_args):
            refuse_changes(resolving_view(server_args))


def resolve_cpu_backends(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_cpu_backends`: SGLang's default needs kernels for AMX."""
    view = resolving_view(server_args)
    if config_of(server_args) is not None and view.device == "cpu" and view.attention_backend is None:
        declare_resolution(server_args, _SOURCE, attention_backend=cpu_engine.default_flags()["attention_backend"])
    previous(server_args)


def resolve_memory(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The resolution step `handle_gpu_memory_settings`: on the CPU engine SGLang lets every rank take the part of
    the host's memory that a device's only user would, so the KV cache gets a fixed size, unless the user set one."""
    view = resolving_view(server_args)
    unset = view.max_total_tokens is None and view.mem_fraction_static is None
    previous(server_args)
    if config_of(server_args) is not None and view.device == "cpu" and unset:
        declare_resolution(server_args, _SOURCE, max_total_tokens=cpu_engine.default_flags()["max_total_tokens"])


@contextmanager
def _one_line(server_args: Any) -> Iterator[None]:
    """Ends the program with a line where these arguments came from a command line; lets errors through otherwise."""
    try:
        yield
    except DwdpConfigError as error:
        if getattr(server_args, _FROM_COMMAND_LINE, False):
            _exit(error)
        raise


def _exit(error: DwdpConfigError) -> None:
    """One line instead of a traceback, for a mistake on the command line."""
    sys.stderr.write(f"sglang-dwdp: error: {error}\n")
    raise SystemExit(2)


def register_resolution() -> None:
    """Register the resolution steps, SGLang's official way to override them."""
    register_resolution_hook("handle_dwdp")(resolve_dwdp)
    register_resolution_hook("handle_data_parallelism")(resolve_data_parallelism)
    register_resolution_hook("handle_load_balance_method")(resolve_load_balance)
    register_resolution_hook("handle_elastic_ep")(resolve_last)
    register_resolution_hook("handle_cpu_backends")(resolve_cpu_backends)
    register_resolution_hook("handle_gpu_memory_settings")(resolve_memory)


HOOKS = (
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", HookType.AFTER, attach_flags),
    Hook("sglang.srt.plugins.load_plugins", HookType.AFTER, open_engine),
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", HookType.AFTER, add_flags),  # the last one: see plugin.py
)
