"""A MoE layer that runs as a shard of expert parallelism, which is what it is in a joint forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput

from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.srt_patches.checks import backend_of_layer
from sglang_dwdp.support.backends import WeightFormat

# A scale of activations over all rows, as FP8 experts have it, would be one of rows that nobody wrote, too.
_JOINT = (WeightFormat.BF16, WeightFormat.BLOCK_FP8, WeightFormat.MXFP4)


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
    backends = {backend_of_layer(layer.fused) for layer in layers}
    if not all(one.name == "triton" and one.weights in _JOINT for one in backends):
        found = ", ".join(sorted(f"{one.weights} experts with {one.name}" for one in backends))
        return f"joint forwards are validated with the MoE runner backend triton for {', '.join(_JOINT)}, not {found}"
    from sglang_dwdp.exchange.flashinfer_inbox import why_unsupported

    return why_unsupported(counts.pop(), size, shape)
