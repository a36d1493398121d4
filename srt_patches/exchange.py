"""Exchange steps (--dwdp-exchange auto): SGLang's small forwards that a group of ranks runs together.

A rank meets its peers before a decode forward. In a joint one, `FusedMoE.forward_impl` sends rows instead of reading
experts; on GPUs that is a second CUDA graph of each decode bucket, captured beside the direct one. An idle rank looks
for peers that wait where SGLang's scheduler would sleep or spin, and computes their rows without a batch of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopKOutputChecker
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.exchange.inbox import Inbox, RowShape
from sglang_dwdp.exchange.layer import shard_table
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.page import share_page
from sglang_dwdp.exchange.policy import StepTimes
from sglang_dwdp.exchange.steps import ExchangeSteps, JointExperts
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.runtime import DwdpRuntime
from sglang_dwdp.srt_patches.forward import current_runtime
from sglang_dwdp.srt_patches.hooks import Hook

logger = logging.getLogger(__name__)
_VARIANT = "dwdp_exchange"
_MAX_ROWS = 256
_WAIT_LIMIT_S = 10.0


class ShardRun:
    """A FusedMoE that computes partial sums with this rank's experts, as in expert parallelism."""

    def __init__(self, layer: Any, shard: range, size: int, rank: int) -> None:
        self._layer, self._shard, self._size, self._rank = layer, shard, size, rank
        names = ["w13_weight", "w2_weight", *(n for n, _ in layer.named_per_expert_tensors(layer.num_experts))]
        self._tensors = {name: _tensor_of(layer, name)[shard.start : shard.stop] for name in names}
        self._on_cpu = layer.w13_weight.device.type == "cpu"

    def __call__(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`Experts`."""
        if self._on_cpu:  # SGLang's native kernel knows no id of -1; it gets experts of no weight
            weights = torch.where(ids < 0, 0.0, weights)
            ids = ids.clamp_min(0)
            if not len(rows):
                return torch.zeros_like(rows)
        topk = StandardTopKOutput(weights, ids, weights)  # nothing reads router logits here
        with self._as_shard():
            output: torch.Tensor = self._layer.run_moe_core(StandardDispatchOutput(rows, None, topk)).hidden_states
        return output

    @contextmanager
    def _as_shard(self) -> Iterator[None]:
        """The layer as a rank of expert parallelism has it. In a CUDA graph this happens at its capture alone."""
        layer, config = self._layer, self._layer.moe_runner_config
        full = {name: _tensor_of(layer, name) for name in self._tensors}
        before = layer.moe_ep_size, layer.moe_ep_rank, layer.num_local_experts, config.num_local_experts, config.inplace
        count = layer.num_experts
        for name, tensor in self._tensors.items():
            layer.replace_expert_tensor(name, tensor)
        layer.moe_ep_size, layer.moe_ep_rank = self._size, self._rank
        layer.num_local_experts = config.num_local_experts = len(self._shard)
        config.inplace = False  # rows lie in memory that peers write to
        if self._on_cpu:
            layer.num_experts = len(self._shard)  # SGLang's native kernel runs as many
        try:
            yield
        finally:
            for name, tensor in full.items():
                layer.replace_expert_tensor(name, tensor)
            (
                layer.moe_ep_size,
                layer.moe_ep_rank,
                layer.num_local_experts,
                config.num_local_experts,
                config.inplace,
            ) = before
            layer.num_experts = count


def _tensor_of(layer: Any, name: str) -> torch.Tensor:
    tensor = getattr(layer, name)
    return tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor


class Stepper:
    """What the hooks of one scheduler share: its exchange steps, and when its GPU is free for them.

    Attributes:
        steps: The rank's exchange steps.
        shape: Of rows.
    """

    def __init__(self, steps: ExchangeSteps, shape: RowShape, *, on_gpu: bool) -> None:
        self.steps, self.shape, self._on_gpu = steps, shape, on_gpu
        self._graphs: dict[int, Any] = {}  # by bucket: what a helper replays
        self._joint_done: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._alone_done: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._is_alone = False
        self._launched_at = 0.0
        self._tokens = 0
        self._us_per_token = 5.0  # of a prefill, until one was timed

    def bucket_of(self, rows: int) -> int:
        """The size of the graph that so many rows are replayed in; `rows` without graphs."""
        return min((size for size in self._graphs if size >= rows), default=rows)

    def begin(self, rows: int) -> bool:
        """A decode forward of `rows` rows is about to run; see `ExchangeSteps.begin`."""
        self._wait_until_free()
        if not self.steps.begin(rows):
            return False
        if self._on_gpu:  # a helper's graph may still run, on another stream
            torch.cuda.current_stream().wait_event(self._joint_done)
        return True

    def launched(self, num_tokens: int, *, is_joint: bool, is_decode: bool) -> None:
        """A forward has been launched on the current stream."""
        self._is_alone = not is_joint
        if self._on_gpu:
            (self._joint_done if is_joint else self._alone_done).record()
        if not is_joint and not is_decode:
            self._launched_at, self._tokens = time.monotonic(), num_tokens
            self.steps.meeting.go_away(num_tokens * self._us_per_token)

    def _wait_until_free(self) -> None:
        """Hold the host while the GPU runs a forward of its own: peers' GPUs would wait for this one otherwise."""
        if not self._is_alone:
            return
        self._is_alone = False
        if self._on_gpu and not self._alone_done.query():
            self._alone_done.synchronize()
            if self._tokens:
                self._us_per_token = (time.monotonic() - self._launched_at) * 1e6 / self._tokens
        self._tokens = 0

    def help_out(self) -> None:
        """Take part in a joint forward with no rows, if peers wait for one."""
        if self.steps.meeting.ended or (self._is_alone and self._on_gpu and not self._alone_done.query()):
            return
        self._is_alone = False
        if not self.steps.begin_help():
            return
        try:
            if not self._on_gpu:
                self._run_layers()
                return
            torch.cuda.current_stream().wait_event(self._joint_done)
            self._graphs[self.bucket_of(self.steps.bucket)].replay()
            self._joint_done.record()
        finally:
            self.steps.end()

    def capture_help(self, bucket: int, stream: Any) -> None:
        """Capture what an idle rank replays in a joint forward of this bucket; all ranks do it at the same time."""
        with self.steps.capture(bucket):
            for _ in range(2):
                self._run_layers()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._run_layers()
        self._graphs[bucket] = graph

    def _run_layers(self) -> None:
        shape = self.shape
        self.steps.help_out(shape.hidden_size, shape.top_k, shape.dtype, padded=self._on_gpu)


_current: list[Stepper] = []  # of this process: none, or one


def set_up(runtime: DwdpRuntime, runner: Any, name: str) -> None:
    """Meet the peers a second time and make what joint forwards need; all ranks of the group call this together.

    Raises:
        DwdpSetupError: A peer failed, or its rows cannot travel.
    """
    from sglang_dwdp.srt_patches.experts import rank_in_group

    layers = runtime.layers()
    rank, size = rank_in_group(), runtime.size
    config = runner.model_config
    shape = RowShape(_MAX_ROWS, layers[0].fused.hidden_size, layers[0].fused.top_k, config.dtype)
    handshake = Exchange(f"{name}.exchange", rank, size, runtime.config.timeout_s)
    try:
        handshake.connect()
        page = share_page(handshake)
        inbox = _inbox(runner.device, handshake, layers, shape, page.lost)
    finally:
        handshake.close()
    placement = layers[0].placement
    joint = {
        layer.layer_id: JointExperts(
            ShardRun(layer.fused, layer.placement.shard(rank), size, rank),
            shard_table(placement.num_experts, layer.placement.shard(rank), runner.device, local=True),
        )
        for layer in layers
    }
    steps = ExchangeSteps(Meeting(page, _first_times(len(layers))), inbox, joint, _MAX_ROWS)
    stepper = Stepper(steps, shape, on_gpu=runner.device == "cuda")
    steps.bucket_of = stepper.bucket_of
    _current[:] = [stepper]
    runtime.add_part(steps.report, steps.close)
    logger.info(
        "DWDP: decode forwards of up to %d sequences a rank are exchange steps, rows travel by %s",
        _MAX_ROWS,
        type(inbox).__name__,
    )


def _inbox(
    device: str, handshake: Exchange, layers: Sequence[Any], shape: RowShape, lost: Callable[[], Sequence[int]]
) -> Inbox:
    if device == "cuda":
        from sglang_dwdp.exchange.flashinfer_inbox import FlashInferInbox

        ids = [layer.layer_id for layer in layers]
        return FlashInferInbox(handshake, layers[0].placement.num_experts, shape, ids, lost)
    from sglang_dwdp.exchange.host_inbox import share_inbox

    return share_inbox(handshake, shape, _WAIT_LIMIT_S, lost)


def _first_times(num_layers: int) -> StepTimes:
    """What small forwards take, before any was timed: per layer as measured for Qwen3-30B-A3B between two H100."""
    alone = [(rows, us * num_layers / 12) for rows, us in ((1, 2100.0), (8, 10300.0), (32, 21500.0), (64, 28000.0))]
    joint = [(rows, us * num_layers / 12) for rows, us in ((1, 2000.0), (8, 3000.0), (32, 4400.0), (64, 6000.0))]
    return StepTimes(alone, joint)


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.forward`: meet the peers before a decode forward."""
    if not _current or runner.is_draft_worker:
        return original(runner, forward_batch, *args, **kwargs)
    stepper, is_decode = _current[0], forward_batch.forward_mode.is_decode()
    is_joint = is_decode and stepper.begin(forward_batch.batch_size)
    try:
        output = original(runner, forward_batch, *args, **kwargs)
    finally:
        stepper.steps.end()
    stepper.launched(forward_batch._forward_num_tokens(), is_joint=is_joint, is_decode=is_decode)
    return output


def idle_step(original: Callable[..., Any], adapter: Any, batch: Any) -> Any:
    """Around `SchedulerDPAttnAdapter.prepare_mlp_sync_batch`: an idle rank helps peers that wait."""
    if batch is None and _current:
        _current[0].help_out()
    return original(adapter, batch)


def run_layer(original: Callable[..., Any], layer: Any, hidden_states: Any, topk_output: Any, **kwargs: Any) -> Any:
    """Around `FusedMoE.forward_impl`: in a joint forward rows travel."""
    if not _current or not _current[0].steps.bucket or not _current[0].steps.has_layer(layer.layer_id):
        return original(layer, hidden_states, topk_output, **kwargs)
    if not TopKOutputChecker.format_is_standard(topk_output):
        raise DwdpSetupError(f"layer {layer.layer_id}: this MoE runner routes by itself; use --dwdp-exchange off.")
    current_runtime().visit(layer.layer_id)
    return _current[0].steps.run_layer(layer.layer_id, hidden_states, topk_output.topk_ids, topk_output.topk_weights)


HOOKS = (
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", HookType.AROUND, forward),
    Hook(
        "sglang.srt.managers.scheduler_components.dp_attn.SchedulerDPAttnAdapter.prepare_mlp_sync_batch",
        HookType.AROUND,
        idle_step,
    ),
    Hook("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward_impl", HookType.AROUND, run_layer),
)


def capture_shape(original: Callable[..., None], runner: Any, size: int, *args: Any, **kwargs: Any) -> None:
    """Around `DecodeCudaGraphRunner.capture_one_shape`: each bucket is captured once more, as a joint forward."""
    original(runner, size, *args, **kwargs)
    if not _current or runner.model_runner.is_draft_worker or size > _MAX_ROWS:
        return
    forward_fn, stream_idx = args[0], args[1] if len(args) > 1 else None
    with _current[0].steps.capture(size):
        original(runner, size, forward_fn, stream_idx, _VARIANT)
    _current[0].capture_help(size, runner.stream)


def graph_variant(original: Callable[..., Any], runner: Any, forward_batch: Any) -> Any:
    """Around `DecodeCudaGraphRunner._resolve_lora_variant`: which of a bucket's two graphs is replayed."""
    if _current and _current[0].steps.bucket:
        return _VARIANT
    return original(runner, forward_batch)


def padded_size(original: Callable[..., int], raw_size: int, buckets: Sequence[int]) -> int:
    """Around `BaseCudaGraphRunner._pad_to_bucket`: in a joint forward all ranks take the largest bucket."""
    return original(max(raw_size, _current[0].steps.bucket) if _current else raw_size, buckets)


_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
GPU_HOOKS = (
    Hook(f"{_RUNNER}.capture_one_shape", HookType.AROUND, capture_shape),
    Hook(f"{_RUNNER}._resolve_lora_variant", HookType.AROUND, graph_variant),
    Hook(
        "sglang.srt.model_executor.runner.base_cuda_graph_runner.BaseCudaGraphRunner._pad_to_bucket",
        HookType.AROUND,
        padded_size,
    ),
)
