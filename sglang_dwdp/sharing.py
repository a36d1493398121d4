"""Sharing the experts of a model among the ranks of a group: once, before serving.

Layer by layer, every rank makes a block for its segment of each expert tensor, swaps descriptors with its
peers, maps everybody's blocks into one view, writes its experts through that view (an expert's first bytes
may lie in the neighbour's last page), and lets the engine free its own copy. So set-up never holds much more
than the shard, the slots and one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError, DwdpSetupError
from sglang_dwdp.layers import ExpertLayer, describe, specs_of
from sglang_dwdp.layout import copy_order, remote_bytes_of_experts
from sglang_dwdp.memory.base import Block, CopyList, Memory
from sglang_dwdp.memory.exchange import Exchange, close_fds
from sglang_dwdp.views import SlotMemory, TensorSpec, View, direct_view, staged_view


@dataclass(slots=True)
class SharedLayer:
    """A MoE layer whose experts are shared.

    direct, staged: the tensors that either kind of forward binds, by name (staged: only the shared ones, and
    empty where no forward is staged).
    copies: what fills the layer's slot.  copy_bytes: its size.
    remote_bytes: `[num_experts]`, bytes of each expert that lie in peers' memory.
    """

    layer: ExpertLayer
    direct: dict[str, torch.Tensor]
    staged: dict[str, torch.Tensor]
    copies: CopyList
    copy_bytes: int
    remote_bytes: list[int]


@dataclass(slots=True)
class SharedExperts:
    """Everything that set-up made; `close` takes it down in reverse order."""

    layers: list[SharedLayer]
    stored_bytes: int
    slot_bytes: int
    replicated_bytes: int
    _stack: ExitStack = field(repr=False)

    def close(self) -> None:
        """Unbind and unmap. Idempotent. The model cannot run afterwards."""
        for shared in self.layers:
            shared.layer.use({name: tensor.new_empty(0) for name, tensor in shared.direct.items()})
        self.layers = []
        self._stack.close()


class _Sharing:
    """The work of `share_experts`: its steps, and what they hand on."""

    def __init__(self, config: DwdpConfig, memory: Memory, exchange: Exchange, owned: ExitStack) -> None:
        self.config, self.memory, self.exchange, self.owned = config, memory, exchange, owned
        self.rank = exchange.rank
        self.slots = SlotMemory(memory, self.rank)
        self.layers: list[SharedLayer] = []
        self.shared_views: list[View] = []
        self.passing_views: list[tuple[SharedLayer, str, View]] = []
        self.stored_bytes = 0
        self.at = "start"

    def run(self, layers: Sequence[ExpertLayer]) -> SharedExperts:
        self.exchange.connect()
        specs = [specs_of(layer, self.rank, self.memory.page_bytes) for layer in layers]
        self._agree(layers, specs)
        for position, layer in enumerate(layers):
            self.at = f"layer {layer.layer_id}"
            self._share(position, layer, specs[position])
        self.at = "last steps"
        self.exchange.barrier()  # every rank has written its experts
        replicated_bytes = self._replicate()
        for view in self.shared_views:
            view.protect()
        self.exchange.barrier()  # no rank serves while another may still fail
        return SharedExperts(self.layers, self.stored_bytes, self.slots.nbytes, replicated_bytes, self.owned.pop_all())

    def _agree(self, layers: Sequence[ExpertLayer], specs: Sequence[Sequence[TensorSpec]]) -> None:
        mine = "\n".join(describe(layer.layer_id, s) for layer, s in zip(layers, specs, strict=True))
        for peer, theirs in enumerate(self.exchange.all_gather(mine.encode())):
            if theirs != mine.encode():
                pairs = zip_longest(mine.split("\n"), theirs.decode().split("\n"), fillvalue="no such layer")
                here, there = next(pair for pair in pairs if pair[0] != pair[1])
                raise DwdpSetupError(f"rank {peer} loaded other experts: here {here}, there {there}")

    def _share(self, position: int, layer: ExpertLayer, specs: Sequence[TensorSpec]) -> None:
        shared = SharedLayer(layer, {}, {}, (), 0, [0] * layer.placement.num_experts)
        pairs: dict[str, tuple[View, View]] = {}
        with ExitStack() as passing:
            blocks = self._swap_blocks(specs, passing)
            for spec in specs:
                self.at = f"layer {layer.layer_id}, {spec.name}"
                here = {rank: by_name[spec.name] for rank, by_name in blocks.items() if spec.name in by_name}
                direct = self._own(direct_view(self.memory, spec, here))
                self._write(layer, spec, direct)
                shared.direct[spec.name] = direct.tensor
                if self._is_small(layer, spec):
                    self.passing_views.append((shared, spec.name, direct))
                    continue
                self._count(shared, spec)
                self.shared_views.append(direct)
                if self.config.view != "direct":
                    slot = self.slots.blocks(position % self.config.depth, spec)
                    staged = self._own(staged_view(self.memory, spec, self.rank, here.get(self.rank), slot))
                    shared.staged[spec.name] = staged.tensor
                    pairs[spec.name] = (staged, direct)
        if pairs:
            self._plan(shared, [spec for spec in specs if spec.name in pairs], pairs)
        layer.bind(shared.direct)
        self.memory.trim()  # what the layer held, before the next one takes its blocks
        self.layers.append(shared)

    def _own(self, view: View) -> View:
        self.owned.callback(view.close)
        return view

    def _swap_blocks(self, specs: Sequence[TensorSpec], stack: ExitStack) -> dict[int, dict[str, Block]]:
        """Every rank's block for every tensor of one layer, by rank and name, closed when `stack` is.

        A rank whose segment of a tensor is empty has none. One message a layer, so few descriptors are open
        at a time.
        """

        def present(rank: int) -> list[TensorSpec]:
            return [spec for spec in specs if spec.layout.segments[rank].nbytes]

        def kept(block: Block) -> Block:
            stack.callback(block.close)
            return block

        own = {
            spec.name: kept(self.memory.create(spec.layout.segments[self.rank].nbytes)) for spec in present(self.rank)
        }
        received = self.exchange.all_gather_fds([self.memory.export(block) for block in own.values()])
        unclaimed = [fd for fds in received for fd in fds]
        stack.callback(lambda: close_fds(unclaimed))
        blocks = {self.rank: own}
        for peer, fds in enumerate(received):
            if peer == self.rank:
                continue
            if len(fds) != len(present(peer)):
                raise DwdpSetupError(f"rank {peer} sent {len(fds)} blocks, {len(present(peer))} were agreed on")
            blocks[peer] = {}
            for spec, fd in zip(present(peer), fds, strict=True):
                unclaimed.remove(fd)
                blocks[peer][spec.name] = kept(self.memory.import_fd(fd, spec.layout.segments[peer].nbytes))
        return blocks

    def _write(self, layer: ExpertLayer, spec: TensorSpec, view: View) -> None:
        span = spec.layout.expert_span(layer.placement.shard(self.rank))
        shard = layer.shards()[spec.name].detach()
        view.piece(span).copy_(shard.reshape(-1).view(torch.uint8))

    def _is_small(self, layer: ExpertLayer, spec: TensorSpec) -> bool:
        return not layer.is_weight(spec.name) and spec.layout.nbytes < self.config.replicate_below_bytes

    def _count(self, shared: SharedLayer, spec: TensorSpec) -> None:
        self.stored_bytes += spec.layout.segments[self.rank].nbytes
        for expert, nbytes in enumerate(remote_bytes_of_experts(spec.layout, self.rank)):
            shared.remote_bytes[expert] += nbytes

    def _plan(self, shared: SharedLayer, specs: Sequence[TensorSpec], pairs: dict[str, tuple[View, View]]) -> None:
        order = copy_order({spec.name: spec.layout for spec in specs}, self.rank, self.config.slice_bytes)
        copies = []
        for piece in order:
            staged, direct = pairs[piece.tensor]
            source = direct.piece(piece.span)
            if source.numel():  # nothing is left of a slice that lies past the tensor, in its last page
                copies.append((staged.piece(piece.span), source))
        shared.copies = copies
        shared.copy_bytes = sum(source.numel() for _, source in copies)

    def _replicate(self) -> int:
        """Give every rank its own copy of the small tensors; returns their bytes."""
        nbytes = 0
        for shared, name, view in self.passing_views:
            full = view.tensor.clone()
            shared.direct[name] = full
            shared.layer.use({name: full})
            view.close()
            nbytes += full.numel() * full.element_size()
        return nbytes


def share_experts(
    config: DwdpConfig, memory: Memory, exchange: Exchange, layers: Sequence[ExpertLayer]
) -> SharedExperts:
    """Share the experts of `layers` with the group; all its ranks call this together.

    Raises:
        DwdpConfigError: the layers cannot be shared. Nothing was allocated.
        DwdpSetupError: something failed here or on a peer, named with its layer and tensor. Everything that
            was mapped is unmapped again; the model cannot run.
    """
    with ExitStack() as owned:
        sharing = _Sharing(config, memory, exchange, owned)
        owned.callback(sharing.slots.close)
        try:
            result = sharing.run(layers)
        except DwdpConfigError as error:
            exchange.fail(str(error))
            raise
        except Exception as error:
            reason = f"rank {exchange.rank}, {sharing.at}: {error}"
            exchange.fail(reason)
            for shared in sharing.layers:  # no parameter may point into what is unmapped next
                shared.layer.use({name: tensor.new_empty(0) for name, tensor in shared.direct.items()})
            raise DwdpSetupError(f"sharing the experts failed: {reason}") from error
        # Views hold the slots' memory from here on; the blocks' descriptors are not needed any more.
        sharing.slots.close()
        return result
