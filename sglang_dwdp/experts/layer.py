"""What the runtime needs to know of a serving engine's MoE layer, and what it may do with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.layout import tensor_layout
from sglang_dwdp.experts.placement import Placement
from sglang_dwdp.experts.views import TensorSpec


class ExpertLayer(Protocol):
    """One MoE layer of the model that this rank runs."""

    @property
    def layer_id(self) -> int:
        """Its number in the model."""

    @property
    def placement(self) -> Placement:
        """Which rank stores which of its routed experts."""

    def shards(self) -> Mapping[str, torch.Tensor]:
        """This rank's part of every per-expert tensor, `[len(shard), …]`, by name; weights first."""

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is a weight (always shared) or belongs to one (scales, biases)."""

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take full tensors `[num_experts, …]` in place of the shards, which are freed."""

    def use(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compute with other memory of the same shapes from now on. Called between layers, so it is cheap."""


def specs_of(layer: ExpertLayer, rank: int, page_bytes: int) -> list[TensorSpec]:
    """The expert tensors of a layer as its shards on `rank` show them.

    Raises:
        DwdpConfigError: the experts of a tensor do not lie one after another, or are not this rank's shard.
    """
    shard = layer.placement.shard(rank)
    specs = []
    for name, tensor in layer.shards().items():
        where = f"layer {layer.layer_id}, {name} {tuple(tensor.shape)}"
        if tensor.shape[0] != len(shard):
            raise DwdpConfigError(
                f"{where}: rank {rank} should have loaded {len(shard)} experts. This model or weight format "
                "loads experts in a way that DWDP does not know; serve it without --enable-dwdp."
            )
        if not tensor.is_contiguous() or tensor[0].numel() == 0:
            raise DwdpConfigError(
                f"{where}, strides {tensor.stride()}: the experts do not lie one after another, so they cannot "
                "be shared expert by expert. Choose another --moe-runner-backend, or drop --enable-dwdp."
            )
        layout = tensor_layout(layer.placement, tensor[0].numel() * tensor.element_size(), page_bytes)
        specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape[1:]), layout))
    return specs


def describe(layer_id: int, specs: Sequence[TensorSpec]) -> str:
    """One line that is equal on two ranks exactly when they can share the layer."""
    tensors = [(s.name, str(s.dtype), s.tail, dataclasses.astuple(s.layout)) for s in specs]
    return json.dumps([layer_id, tensors])
