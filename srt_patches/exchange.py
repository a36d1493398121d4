"""Exchange steps (--dwdp-exchange): SGLang's small forwards that a group of ranks runs together.

A rank meets its peers before a decode, and before a short prefill. In a joint one, `FusedMoE.forward_impl`
sends rows instead of reading experts; on GPUs that is a second CUDA graph of each decode bucket and of some prefill
buckets, captured beside the first (`exchange_graphs.py`). An idle rank looks for peers that wait where SGLang's
scheduler would sleep or spin, and computes their rows without a batch of its own. What is shared between these hooks is
in `exchange_steps.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_exec

from sglang_dwdp.errors import DwdpRuntimeError, DwdpSetupError
from sglang_dwdp.exchange.bells import share_bells
from sglang_dwdp.exchange.inbox import Inbox, RowShape
from sglang_dwdp.exchange.joint import JointForwards
from sglang_dwdp.exchange.layer import shard_table
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.page import share_page
from sglang_dwdp.exchange.policy import StepTimes, prefill_buckets
from sglang_dwdp.exchange.round import MAX_DECODE_ROWS
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches import hosts
from sglang_dwdp.srt_patches.exchange_steps import ExchangeSteps
from sglang_dwdp.srt_patches.forward import current_runtime
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.joint_layers import JointLayers
from sglang_dwdp.srt_patches.shard_run import JointLayer, ShardRun, why_alone

logger = logging.getLogger(__name__)
# On the CPU engine, which has no graphs, computing takes longer than reading, so that only very short prefills gain.
_CPU_PREFILLS = (512,)
_WAIT_LIMIT_S = 10.0
_NEXT_STEP_MS = 100  # after which an idle rank that has helped looks after itself again
_HOUSEKEEPING_S = 1.0  # at the latest after which one that helps does: its load, that it publishes, is a sign of life
# Where forwards are not graphs, which are timed at start. Ranks of the CPU engine share few cores, so a peer may be
# milliseconds late.
_UNTIMED = StepTimes(*([(rows, us) for rows in (1, *_CPU_PREFILLS)] for us in (40_000.0, 4_000.0)))


_current: list[ExchangeSteps] = []  # of this process: none, or one


def set_up(runtime: DwdpRuntime, runner: Any, name: str) -> None:
    """Meet the peers a second time and make what joint forwards need; all ranks of the group call this together.

    Where rows cannot travel, nothing is made, and ranks decode alone.

    Raises:
        DwdpSetupError: A peer failed.
    """
    from sglang_dwdp.srt_patches.experts import rank_in_group

    layers: list[Any] = runtime.weights.layers()
    rank, size = rank_in_group(), runtime.size
    config = runner.model_config
    buckets = _prefill_sizes(size, runner.device)
    if not buckets:
        logger.warning("DWDP: ranks run no prefills together: those need CUDA graphs of 257 to 5,120 tokens.")
    shape = RowShape(max((MAX_DECODE_ROWS, *buckets)), layers[0].fused.hidden_size, layers[0].fused.top_k, config.dtype)
    why = "a group over several hosts has no memory for it" if hosts.is_group_across() else None
    why = why or why_alone(layers, size, shape, runner.device)
    if why is not None:
        logger.warning("DWDP: ranks decode alone, whatever --dwdp-exchange says: %s.", why)
        return
    handshake = Exchange(f"{name}.exchange", rank, size, runtime.config.timeout_s)
    try:
        handshake.connect()
        page = share_page(handshake)
        bells = share_bells(handshake)
        inbox = _inbox(runner.device, handshake, layers, shape, page.lost)
    finally:
        handshake.close()
    joint = {
        layer.layer_id: JointLayer(
            ShardRun(layer.fused, layer.placement.shard(rank), size, rank),
            shard_table(layer.placement.num_experts, layer.placement.shard(rank), runner.device, local=True),
        )
        for layer in layers
    }
    meeting = Meeting(page, _UNTIMED, bells, serves=runner.device == "cuda")
    forwards = JointForwards(meeting, inbox, _WAIT_LIMIT_S)
    steps = ExchangeSteps(forwards, bells, JointLayers(forwards, joint, shape, runner.device), buckets)
    _current[:], runtime.staged.between_segments = [steps], steps.between_pieces
    runtime.add_part(forwards.report, forwards.close)
    logger.info(
        "DWDP: decodes of up to %d sequences a rank%s may be exchange steps; rows travel by %s",
        MAX_DECODE_ROWS,
        f" and prefills of up to {buckets[-1]} tokens" if buckets else "",
        type(inbox).__name__,
    )


def _prefill_sizes(ranks: int, device: str) -> tuple[int, ...]:
    """Sizes of joint prefills, which have to be graphs: an eager one takes as long as a staged one in a graph."""
    if device != "cuda":
        return _CPU_PREFILLS
    graphs = get_exec().graph.cuda_graph_config.prefill
    return () if graphs.backend == Backend.DISABLED else prefill_buckets(graphs.bs or (), ranks)


def _inbox(
    device: str, handshake: Exchange, layers: Sequence[Any], shape: RowShape, lost: Callable[[], Sequence[int]]
) -> Inbox:
    if device == "cuda":
        from sglang_dwdp.exchange.flashinfer_inbox import FlashInferInbox

        ids = [layer.layer_id for layer in layers]
        return FlashInferInbox(handshake, layers[0].placement.num_experts, shape, ids, lost)
    from sglang_dwdp.exchange.host_inbox import share_inbox

    return share_inbox(handshake, shape, _WAIT_LIMIT_S, lost)


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.forward`: meet the peers before a small forward."""
    if not _current or runner.is_draft_worker:
        return original(runner, forward_batch, *args, **kwargs)
    steps, is_decode = _current[0], forward_batch.forward_mode.is_decode()
    rows = forward_batch.batch_size if is_decode else _prefill_rows(steps, runner, forward_batch)
    is_joint = current_runtime().in_exchange_step = _begin(steps, rows, is_decode=is_decode)
    try:
        output = original(runner, forward_batch, *args, **kwargs)
    except DwdpRuntimeError as error:
        if not is_joint:
            raise
        go_on_alone(error)
        is_joint = current_runtime().in_exchange_step = False
        output = original(runner, forward_batch, *args, **kwargs)  # it writes the same KV to the same places
    steps.end(is_joint=is_joint)
    return output


def _prefill_rows(steps: ExchangeSteps, runner: Any, forward_batch: Any) -> int:
    """Tokens that a prefill brings to a joint forward, if it is short enough for one.

    0 on a GPU if SGLang will run a short one without a graph, as it does with a single token that no cache has, or with
    embeddings as input: peers would wait in their kernels while it is launched.
    """
    rows = int(forward_batch._forward_num_tokens())
    if runner.device != "cuda" or not steps.bucket_of(rows, is_decode=False):
        return rows
    graphs = runner.prefill_cuda_graph_runner
    fits = forward_batch.forward_mode.is_extend() and graphs and graphs.can_run_graph(forward_batch)
    return rows if fits else 0


def _begin(steps: ExchangeSteps, rows: int, *, is_decode: bool) -> bool:
    try:
        return steps.begin(rows, is_decode=is_decode)
    except DwdpRuntimeError as error:
        go_on_alone(error)
        return False


def go_on_alone(error: DwdpRuntimeError) -> None:
    """A peer has left a joint forward: this rank's forwards are no longer joint."""
    logger.warning("DWDP: this rank decodes alone from here on: %s", error)
    _current[0].forwards.end()


def idle(original: Callable[..., None], scheduler: Any) -> None:
    """Around `Scheduler.on_idle`: an idle rank helps peers, step after step, until it has a request of its own."""
    if not _current:
        original(scheduler)
        return
    steps, channels, now = _current[0], scheduler.ipc_channels, time.monotonic()
    if not _help_out(steps) or now >= steps.housekeeping_at:
        steps.housekeeping_at = now + _HOUSEKEEPING_S
        original(scheduler)
        return
    sockets = [one for one in (channels.recv_from_tokenizer, channels.recv_from_rpc) if isinstance(one, zmq.Socket)]
    # Requests may come another way, or wait here for a grammar, a cache or memory: look there after each step.
    if not sockets or not scheduler.is_fully_idle():
        return
    poller, bell = zmq.Poller(), steps.bells.fileno()
    for source in (*sockets, bell):
        poller.register(source, zmq.POLLIN)
    while time.monotonic() < steps.housekeeping_at and [one for one, _ in poller.poll(_NEXT_STEP_MS)] == [bell]:
        steps.bells.silence()
        _help_out(steps)


def _help_out(steps: ExchangeSteps) -> bool:
    try:
        return steps.help_out()
    except DwdpRuntimeError as error:
        go_on_alone(error)
        return False


def sleep(original: Callable[..., None], sleeper: Any) -> None:
    """Around `IdleSleeper.maybe_sleep` (--sleep-on-idle): peers that wait wake this rank."""
    if not _current:
        original(sleeper)
        return
    sleeper.poller.register(_current[0].bells.fileno(), zmq.POLLIN)  # again and again, which costs little
    original(sleeper)
    _current[0].bells.silence()


def run_layer(original: Callable[..., Any], layer: Any, hidden_states: Any, topk_output: Any, **kwargs: Any) -> Any:
    """Around `FusedMoE.forward_impl`: in a joint forward rows travel."""
    if not _current or not _current[0].bucket or layer.layer_id not in _current[0].layers:
        return original(layer, hidden_states, topk_output, **kwargs)
    if not TopKOutputChecker.format_is_standard(topk_output):
        raise DwdpSetupError(f"layer {layer.layer_id}: this MoE runner routes by itself; use --dwdp-exchange off.")
    current_runtime().visit(layer.layer_id)
    return _current[0].layers.run(layer.layer_id, hidden_states, topk_output.topk_ids, topk_output.topk_weights)


HOOKS = (
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", HookType.AROUND, forward),
    Hook("sglang.srt.managers.scheduler.Scheduler.on_idle", HookType.AROUND, idle),
    Hook("sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper.maybe_sleep", HookType.AROUND, sleep),
    Hook("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward_impl", HookType.AROUND, run_layer),
)


def current_steps() -> ExchangeSteps | None:
    """The exchange steps of this process; None without them."""
    return _current[0] if _current else None
