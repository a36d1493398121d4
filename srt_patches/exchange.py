"""Exchange steps (--dwdp-exchange auto): SGLang's small forwards that a group of ranks runs together.

A rank meets its peers before a decode forward. In a joint one, `FusedMoE.forward_impl` sends rows instead of reading
experts; on GPUs that is a second CUDA graph of each decode bucket, captured beside the direct one. An idle rank looks
for peers that wait where SGLang's scheduler would sleep or spin, and computes their rows without a batch of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopKOutputChecker
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.exchange.inbox import Inbox, RowShape
from sglang_dwdp.exchange.joint import JointForwards
from sglang_dwdp.exchange.layer import shard_table
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.page import share_page
from sglang_dwdp.exchange.policy import StepTimes
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
        with self._as_shard():
            if not self._on_cpu:
                return self._run(rows, ids, weights)
            # SGLang's native kernel knows no id of -1, so each choice of experts is run for the rows that have it.
            total = torch.zeros_like(rows)
            for choice in range(ids.shape[1]):
                kept = ids[:, choice] >= 0
                if kept.any():
                    column = slice(choice, choice + 1)
                    total[kept] += self._run(rows[kept], ids[kept, column], weights[kept, column])
            return total

    def _run(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        topk = StandardTopKOutput(weights, ids, weights)  # nothing reads router logits here
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


@dataclass(frozen=True, slots=True)
class JointLayer:
    """What a MoE layer computes in a joint forward.

    Attributes:
        experts: Partial sums with the experts that this rank stores.
        table: `shard_table` of those experts.
    """

    experts: ShardRun
    table: torch.Tensor


class ExchangeSteps:
    """The exchange steps of one scheduler: what the hooks share.

    Attributes:
        forwards: Decides with the peers which forwards are joint.
        bucket: Of the joint forward under way, or under capture; 0 outside of one.
    """

    def __init__(self, forwards: JointForwards, layers: Mapping[int, JointLayer], shape: RowShape, device: str) -> None:
        """Steps of a rank with these layers, by layer id in the order in which a forward runs them."""
        self.forwards, self._layers, self._shape = forwards, layers, shape
        self._on_gpu = device == "cuda"
        self._graphs: dict[int, Any] = {}  # by bucket: what an idle rank replays
        self._joint_done: Any = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._alone_done: Any = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]
        # Rows of a graph's bucket that are a request's; the others are padding, and are sent nowhere.
        self._num_rows = torch.zeros(1, dtype=torch.int32, device=device)
        self._row_numbers = torch.arange(shape.max_bucket, dtype=torch.int32, device=device)[:, None]
        self._prefill_us = 5.0  # of a token
        self._waits: deque[Callable[[], None]] = deque()  # of forwards whose results were not asked for yet

    @property
    def bucket(self) -> int:
        return self.forwards.bucket or 0

    def has_layer(self, layer_id: int) -> bool:
        """Whether a layer's rows can travel."""
        return layer_id in self._layers

    def bucket_of(self, rows: int) -> int:
        """The size of the graph that so many rows are replayed in; `rows` without graphs."""
        return min((size for size in self._graphs if size >= rows), default=rows)

    def begin(self, rows: int, *, is_decode: bool) -> bool:
        """A forward of `rows` rows is about to run.

        Returns:
            Whether it is joint.

        Raises:
            DwdpRuntimeError: A peer stopped in the middle of a change.
        """
        if not is_decode:
            self.forwards.begin(self._shape.max_bucket + 1, rows * self._prefill_us)
            return False
        if self.forwards.begin(self.bucket_of(rows)) is None:
            return False
        self._num_rows.fill_(rows)
        if self._on_gpu:  # an idle rank's graph may still run, on another stream
            torch.cuda.current_stream().wait_event(self._joint_done)
        return True

    def end(self, *, is_joint: bool) -> None:
        """The forward has been launched on the current stream."""
        done = self._joint_done if is_joint else self._alone_done
        if self._on_gpu:
            done.record()
        self._waits.append(self.forwards.end(done))

    def wait(self) -> None:
        """Wait for the oldest forward whose result was not asked for: a peer may have left it.

        Raises:
            DwdpRuntimeError: It did; layer and peer are named.
        """
        if self._waits:
            self._waits.popleft()()

    def help_out(self) -> None:
        """An idle rank: take part in a joint forward with no rows, if peers wait for one.

        Raises:
            DwdpRuntimeError: As `begin`.
        """
        while self._waits:
            self.wait()
        if self.forwards.begin(0) is None:
            return
        self._num_rows.fill_(0)
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._joint_done)
            self._graphs[self.bucket_of(self.bucket)].replay()
        else:
            self._run_layers(0)
        self.end(is_joint=True)

    @contextmanager
    def capture(self, bucket: int) -> Iterator[None]:
        """Warm-ups and the capture of a joint forward of this bucket; all ranks do it at the same time."""
        self._num_rows.fill_(bucket)
        with self.forwards.capturing(bucket):
            yield

    def capture_help(self, bucket: int, stream: Any) -> None:
        """Capture what an idle rank replays in a joint forward of this bucket; all ranks do it at the same time."""
        with self.capture(bucket):
            for _ in range(2):
                self._run_layers(bucket)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._run_layers(bucket)
        self._graphs[bucket] = graph

    def _run_layers(self, num_rows: int) -> None:
        """All MoE layers, with so many rows of padding."""
        shape, device = self._shape, self._num_rows.device
        rows = torch.zeros((num_rows, shape.hidden_size), dtype=shape.dtype, device=device)
        ids = torch.zeros((num_rows, shape.top_k), dtype=torch.int32, device=device)
        weights = torch.zeros((num_rows, shape.top_k), dtype=torch.float32, device=device)
        for layer_id in self._layers:
            self.run_layer(layer_id, rows, ids, weights)

    def run_layer(self, layer_id: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One MoE layer of the joint forward under way.

        Args:
            layer_id: Which one.
            rows: `[n, hidden_size]`, padding included.
            ids: `[n, top_k]`, of all experts of the model.
            weights: `[n, top_k]`.

        Returns:
            `[n, hidden_size]`.

        Raises:
            DwdpRuntimeError: A peer took no part; see `Inbox.dispatch`.
        """
        layer = self._layers[layer_id]
        own = torch.where(self._row_numbers[: len(rows)] < self._num_rows, ids, -1).to(torch.int32)
        weights = weights.to(torch.float32).contiguous()
        return self.forwards.layer(layer_id, rows.contiguous(), own, weights, layer.experts, layer.table)


_current: list[ExchangeSteps] = []  # of this process: none, or one


def set_up(runtime: DwdpRuntime, runner: Any, name: str) -> None:
    """Meet the peers a second time and make what joint forwards need; all ranks of the group call this together.

    Where rows cannot travel, nothing is made, and ranks decode alone.

    Raises:
        DwdpSetupError: A peer failed.
    """
    from sglang_dwdp.srt_patches.experts import rank_in_group

    layers: list[Any] = runtime.layers()
    rank, size = rank_in_group(), runtime.size
    config = runner.model_config
    shape = RowShape(_MAX_ROWS, layers[0].fused.hidden_size, layers[0].fused.top_k, config.dtype)
    why = why_alone(layers, size, shape, runner.device)
    if why is not None:
        logger.warning("DWDP: ranks decode alone, whatever --dwdp-exchange says: %s.", why)
        return
    handshake = Exchange(f"{name}.exchange", rank, size, runtime.config.timeout_s)
    try:
        handshake.connect()
        page = share_page(handshake)
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
    forwards = JointForwards(Meeting(page, _step_times(len(layers), runner.device)), inbox, _MAX_ROWS, _WAIT_LIMIT_S)
    _current[:] = [ExchangeSteps(forwards, joint, shape, runner.device)]
    runtime.add_part(forwards.report, forwards.close)
    logger.info(
        "DWDP: decode forwards of up to %d sequences a rank may be exchange steps; rows travel by %s",
        _MAX_ROWS,
        type(inbox).__name__,
    )


def why_alone(layers: Sequence[Any], size: int, shape: RowShape, device: str) -> str | None:
    """Why a model's layers cannot run in joint forwards; None if they can.

    Args:
        layers: Its MoE layers.
        size: Ranks of the group.
        shape: Of rows, as the first layer has them.
        device: "cuda" or "cpu".
    """
    counts = {layer.placement.num_experts for layer in layers}
    rows = {(layer.fused.hidden_size, layer.fused.top_k) for layer in layers}
    if len(counts) > 1 or rows != {(shape.hidden_size, shape.top_k)}:
        return "its MoE layers differ in their numbers of experts, or in their rows"
    if device != "cuda":
        return None
    backends = {getattr(layer.fused.runner_backend, "value", None) for layer in layers}
    if backends != {"triton"}:
        return f"joint forwards are validated with the MoE runner backend triton, not with {sorted(map(str, backends))}"
    from sglang_dwdp.exchange.flashinfer_inbox import why_unsupported

    return why_unsupported(counts.pop(), size, shape)


def _inbox(
    device: str, handshake: Exchange, layers: Sequence[Any], shape: RowShape, lost: Callable[[], Sequence[int]]
) -> Inbox:
    if device == "cuda":
        from sglang_dwdp.exchange.flashinfer_inbox import FlashInferInbox

        ids = [layer.layer_id for layer in layers]
        return FlashInferInbox(handshake, layers[0].placement.num_experts, shape, ids, lost)
    from sglang_dwdp.exchange.host_inbox import share_inbox

    return share_inbox(handshake, shape, _WAIT_LIMIT_S, lost)


def _step_times(num_layers: int, device: str) -> StepTimes:
    """What small forwards take, by which a rank decides how long to wait.

    For every model and GPU, per layer: alone what was measured for Qwen3-30B-A3B between two H100, joint what was
    expected there. So a rank may wait too long, or not long enough, on others.
    """
    if device == "cpu":  # ranks of the CPU engine share few cores, so a peer may be milliseconds late
        return StepTimes(((1, 40_000.0),), ((1, 4_000.0),))
    alone = [(rows, us * num_layers / 12) for rows, us in ((1, 2100.0), (8, 10300.0), (32, 21500.0), (64, 28000.0))]
    joint = [(rows, us * num_layers / 12) for rows, us in ((1, 2000.0), (8, 3000.0), (32, 4400.0), (64, 6000.0))]
    return StepTimes(alone, joint)


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.forward`: meet the peers before a decode forward."""
    if not _current or runner.is_draft_worker:
        return original(runner, forward_batch, *args, **kwargs)
    steps, mode = _current[0], forward_batch.forward_mode
    rows = forward_batch.batch_size if mode.is_decode() else forward_batch._forward_num_tokens()
    is_joint = steps.begin(rows, is_decode=mode.is_decode())
    output = original(runner, forward_batch, *args, **kwargs)
    steps.end(is_joint=is_joint)
    return output


def idle_step(original: Callable[..., Any], adapter: Any, batch: Any) -> Any:
    """Around `SchedulerDPAttnAdapter.prepare_mlp_sync_batch`: an idle rank helps peers that wait."""
    if batch is None and _current:
        _current[0].help_out()
    return original(adapter, batch)


def before_result(_scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before `Scheduler.process_batch_result`: the kernels of a joint forward may wait for a peer that has ended."""
    if _current:
        _current[0].wait()


def run_layer(original: Callable[..., Any], layer: Any, hidden_states: Any, topk_output: Any, **kwargs: Any) -> Any:
    """Around `FusedMoE.forward_impl`: in a joint forward rows travel."""
    if not _current or not _current[0].bucket or not _current[0].has_layer(layer.layer_id):
        return original(layer, hidden_states, topk_output, **kwargs)
    if not TopKOutputChecker.format_is_standard(topk_output):
        raise DwdpSetupError(f"layer {layer.layer_id}: this MoE runner routes by itself; use --dwdp-exchange off.")
    current_runtime().visit(layer.layer_id)
    return _current[0].run_layer(layer.layer_id, hidden_states, topk_output.topk_ids, topk_output.topk_weights)


HOOKS = (
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", HookType.AROUND, forward),
    Hook(
        "sglang.srt.managers.scheduler_components.dp_attn.SchedulerDPAttnAdapter.prepare_mlp_sync_batch",
        HookType.AROUND,
        idle_step,
    ),
    Hook("sglang.srt.managers.scheduler.Scheduler.process_batch_result", HookType.BEFORE, before_result),
    Hook("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward_impl", HookType.AROUND, run_layer),
)


def capture_shape(original: Callable[..., None], runner: Any, size: int, *args: Any, **kwargs: Any) -> None:
    """Around `DecodeCudaGraphRunner.capture_one_shape`: each bucket is captured once more, as a joint forward."""
    original(runner, size, *args, **kwargs)
    if not _current or runner.model_runner.is_draft_worker or size > _MAX_ROWS:
        return
    forward_fn, stream_idx = args[0], args[1] if len(args) > 1 else None
    with _current[0].capture(size):
        original(runner, size, forward_fn, stream_idx, _VARIANT)
    _current[0].capture_help(size, runner.stream)


def graph_variant(original: Callable[..., Any], runner: Any, forward_batch: Any) -> Any:
    """Around `DecodeCudaGraphRunner._resolve_lora_variant`: which of a bucket's two graphs is replayed."""
    if _current and _current[0].bucket:
        return _VARIANT
    return original(runner, forward_batch)


def padded_size(original: Callable[..., int], raw_size: int, buckets: Sequence[int]) -> int:
    """Around `BaseCudaGraphRunner._pad_to_bucket`: in a joint forward all ranks take the largest bucket."""
    return original(max(raw_size, _current[0].bucket) if _current else raw_size, buckets)


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
