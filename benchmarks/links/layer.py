"""One MoE layer whose experts the ranks share with the runtime's own set-up, and its copy plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.links.device import Device
from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.experts.layer import tensors_of
from sglang_dwdp.experts.layout import TensorLayout, copy_order, tensor_layout
from sglang_dwdp.experts.placement import Placement, balanced
from sglang_dwdp.experts.share import SharedExperts, share_experts
from sglang_dwdp.memory.base import CopyList
from sglang_dwdp.memory.handshake import Exchange

UNCUT = 1 << 50  # a slice size that cuts nothing


@dataclass(frozen=True, slots=True)
class Shape:
    """Experts of one layer; by default Qwen3-30B-A3B's, in bf16."""

    experts: int = 128
    hidden: int = 2048
    intermediate: int = 768
    top_k: int = 8


Tensors = Mapping[str, torch.Tensor]


class PlainLayer:
    """One rank's share of the layer, as the set-up sees it: an `ExpertLayer`."""

    layer_id = 0

    def __init__(self, placement: Placement, shards: Tensors) -> None:
        self.placement = placement
        self._shards = shards

    def shards(self) -> Tensors:
        return self._shards

    def is_weight(self, name: str) -> bool:
        return True

    def bind(self, tensors: Tensors) -> None:
        self._shards = {}

    def use(self, tensors: Tensors) -> None:
        """Nothing computes with this layer."""


def full_experts(shape: Shape, device: str) -> Tensors:
    """The experts, the same on every rank: `w13_weight` `[E, 2 I, H]` and `w2_weight` `[E, H, I]`, bf16."""
    generator = torch.Generator(device).manual_seed(17)

    sizes = {
        "w13_weight": (shape.experts, 2 * shape.intermediate, shape.hidden),
        "w2_weight": (shape.experts, shape.hidden, shape.intermediate),
    }
    how: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    return {name: torch.randn(*size, **how) for name, size in sizes.items()}


class SharedLayer:
    """A layer shared among the ranks of `exchange`, and a resident copy of all its experts to compare with.

    Raises:
        DwdpSetupError: See `share_experts`.
    """

    def __init__(self, device: Device, exchange: Exchange, shape: Shape) -> None:
        self.rank = exchange.rank
        self._memory = device.memory
        self.placement = balanced(shape.experts, exchange.size)
        self.full = full_experts(shape, device.device)
        mine = self.placement.shard(self.rank)
        layer = PlainLayer(
            self.placement, {name: full[mine.start : mine.stop].clone() for name, full in self.full.items()}
        )
        self.layouts: dict[str, TensorLayout] = {
            tensor.name: tensor_layout(self.placement, tensor.expert_bytes, device.memory.page_bytes)
            for tensor in tensors_of(layer, self.rank)
        }
        self._shared: SharedExperts = share_experts(DwdpConfig(view="auto"), device.memory, exchange, [layer])
        self.direct, self.staged = self._shared.layers[0].direct, self._shared.layers[0].staged

    def plan(self, slice_bytes: int, source: int | None = None) -> CopyList:
        """What fills the slot, by the runtime's own order; from `source` alone where it is given."""
        pairs = []
        for piece in copy_order(self.layouts, self.rank, slice_bytes):
            if source is None or piece.owner == source:
                to, read = (
                    view[piece.tensor].view(-1).view(torch.uint8)[piece.span.offset : piece.span.end]
                    for view in (self.staged, self.direct)
                )
                pairs.append((to, read))
        return [(to, read) for to, read in pairs if read.numel()]

    def direct_is_right(self) -> bool:
        """Whether the direct view has, bit by bit, the experts of all owners."""
        return all(torch.equal(self.direct[name], full) for name, full in self.full.items())

    def staged_after(self, copies: CopyList, fill: Callable[[], None]) -> bool:
        """Whether `fill`, which runs all of a plan's copies, brings every byte to a poisoned slot."""
        for to, _ in copies:
            to.fill_(0xA5)
        self._memory.finish_writes()
        fill()
        self._memory.finish_writes()
        return all(torch.equal(self.staged[name], full) for name, full in self.full.items())

    def close(self) -> None:
        """Unmap."""
        self.direct, self.staged = {}, {}
        self._shared.close()
