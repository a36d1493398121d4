"""What the runtime needs to know of a serving engine's MoE layer, and what it may do with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.placement import Placement

REPLICATE_BELOW_BYTES = 8 << 20
"""Tensors other than weights that are smaller than this are replicated, not shared: four pages of a GPU's memory
(2 MiB each), too few to spread over the ranks."""


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


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One expert tensor of a layer, the same on all ranks.

    Attributes:
        name: its name in the layer.
        dtype: its elements' type.
        expert_shape: shape of one expert's part.
        replicated: whether every rank gets a copy of its own, so that nothing of it is shared.
    """

    name: str
    dtype: torch.dtype
    expert_shape: tuple[int, ...]
    replicated: bool

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.dtype.itemsize * torch.Size(self.expert_shape).numel()


def tensors_of(layer: ExpertLayer, rank: int) -> list[ExpertTensor]:
    """The expert tensors of a layer, as its shards on `rank` show them.

    Raises:
        DwdpConfigError: the experts of a tensor do not lie one after another, or are not this rank's shard.
    """
    shard = layer.placement.shard(rank)
    tensors = []
    for name, loaded in layer.shards().items():
        where = f"layer {layer.layer_id}, {name} {tuple(loaded.shape)}"
        if loaded.shape[0] != len(shard):
            raise DwdpConfigError(
                f"{where}: rank {rank} should have loaded {len(shard)} experts. This model or weight format "
                "loads experts in a way that DWDP does not support; serve it without --enable-dwdp."
            )
        if not loaded.is_contiguous() or loaded[0].numel() == 0:
            raise DwdpConfigError(
                f"{where}, strides {loaded.stride()}: the experts do not lie one after another, so they cannot "
                "be shared expert by expert. Choose another --moe-runner-backend, or drop --enable-dwdp."
            )
        nbytes = layer.placement.num_experts * loaded[0].nbytes
        replicated = not layer.is_weight(name) and nbytes < REPLICATE_BELOW_BYTES
        tensors.append(ExpertTensor(name, loaded.dtype, tuple(loaded.shape[1:]), replicated))
    return tensors


def describe(layer: ExpertLayer, tensors: Sequence[ExpertTensor], local_experts: int | None, page_bytes: int) -> str:
    """One line that is equal on two ranks exactly when they can share the layer."""
    described = [(tensor.name, str(tensor.dtype), tensor.expert_shape, tensor.replicated) for tensor in tensors]
    return json.dumps([layer.layer_id, layer.placement.boundaries, local_experts, page_bytes, described])
