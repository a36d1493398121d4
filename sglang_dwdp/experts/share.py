"""Sharing the experts of a model among the ranks of a group: once, before serving.

Layer by layer, every rank makes blocks for its segment of each expert tensor, swaps handles with its peers, puts
its experts in place (`placing`), and lets the engine free its own copy. So set-up never holds much more than the
experts that the rank keeps, the slots and one layer. Replicas are fetched from their owners when all have written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError, DwdpSetupError
from sglang_dwdp.experts.backing import Mapped, Placed, Placer, Unmapped
from sglang_dwdp.experts.budget import Tensors, local_experts
from sglang_dwdp.experts.layer import ExpertLayer, describe, specs_of
from sglang_dwdp.experts.layout import Span, copy_order, remote_bytes_of_experts, tensor_layout
from sglang_dwdp.experts.views import SlotMemory, TensorSpec
from sglang_dwdp.memory.base import Block, CopyList, Memory
from sglang_dwdp.memory.handles import agree_on_handles, swap_blocks
from sglang_dwdp.memory.handshake import Exchange


@dataclass(slots=True)
class SharedLayer:
    """A MoE layer whose experts are shared.

    direct, staged: the tensors that either kind of forward binds, by name (staged: only the shared ones, and
    empty where no forward is staged). Where memory cannot be mapped, `direct` has the staged ones.
    copies: what fills the layer's slot.  copy_bytes: its size.
    remote_bytes: `[num_experts]`, bytes of each expert that lie in peers' memory.
    """

    layer: ExpertLayer
    direct: dict[str, torch.Tensor]
    staged: dict[str, torch.Tensor]
    copies: CopyList
    copy_bytes: int
    remote_bytes: list[int]


Ready = Callable[[Sequence[SharedLayer]], None]


@dataclass(slots=True)
class SharedExperts:
    """Everything that set-up made; `close` takes it down in reverse order.

    local_experts: how many experts of a layer this rank keeps.
    peak_bytes: the most that set-up held for experts at a time, with what the engine had loaded.
    """

    layers: list[SharedLayer]
    local_experts: int
    stored_bytes: int
    slot_bytes: int
    replicated_bytes: int
    peak_bytes: int
    _stack: ExitStack = field(repr=False)

    def close(self) -> None:
        """Unbind and unmap. Idempotent. The model cannot run afterwards."""
        for shared in self.layers:
            shared.layer.use({name: tensor.new_empty(0) for name, tensor in shared.direct.items()})
        self.layers = []
        self._stack.close()


class _Sharing:
    """The work of `share_experts`: its steps, and what they hand on."""

    def __init__(
        self, config: DwdpConfig, memory: Memory, exchange: Exchange, owned: ExitStack, ready: Ready | None
    ) -> None:
        self.config, self.memory, self.exchange, self.owned, self.ready = config, memory, exchange, owned, ready
        self.of_small = owned.enter_context(ExitStack())  # blocks that are of no use once replicas are made
        self.rank = exchange.rank
        self.slots = SlotMemory(memory, self.rank)
        self.placer: Placer = (
            Mapped(memory, self.rank, self.slots, owned) if memory.maps else Unmapped(self.rank, self.slots)
        )
        self.layers: list[SharedLayer] = []
        self.copies_of_small: list[tuple[SharedLayer, str, Callable[[], torch.Tensor]]] = []
        self.stored_bytes = 0
        self.held_at_start = 0
        self.peak_bytes = 0
        self.at = "start"

    def run(self, layers: Sequence[ExpertLayer]) -> SharedExperts:
        self.exchange.connect()
        self.handles = agree_on_handles(self.memory, self.exchange)
        plain = [specs_of(layer, self.rank, self.memory.page_bytes) for layer in layers]
        kept, specs = self._keep(layers, plain)
        self._agree(layers, specs)
        self.memory.trim()
        loaded = sum(tensor.nbytes for layer in layers for tensor in layer.shards().values())
        self.held_at_start = self.memory.held_bytes - loaded
        for position, layer in enumerate(layers):
            self.at = f"layer {layer.layer_id}"
            self._share(position, layer, specs[position])
        self.at = "last steps"
        self.memory.finish_writes()
        self.exchange.barrier()  # every rank has written its experts
        replicated_bytes = self._replicate()
        self.placer.finish()
        self.memory.finish_writes()
        if self.ready is not None:
            self.ready(self.layers)
        self.exchange.barrier()  # no rank serves while another may still fail
        self.of_small.close()
        return SharedExperts(
            self.layers,
            kept,
            self.stored_bytes,
            self.slots.nbytes,
            replicated_bytes,
            self.peak_bytes,
            self.owned.pop_all(),
        )

    def _keep(
        self, layers: Sequence[ExpertLayer], specs: Sequence[Sequence[TensorSpec]]
    ) -> tuple[int, list[list[TensorSpec]]]:
        """How many experts of a layer this rank keeps, and the specs laid out for that."""
        shared = [
            {spec.name: spec.layout.expert_bytes for spec in of_layer if not self._is_small(layer, spec)}
            for layer, of_layer in zip(layers, specs, strict=True)
        ]
        largest = max(layers, key=lambda layer: layer.placement.num_experts).placement
        tensors = Tensors(
            [(layer.placement, sizes) for layer, sizes in zip(layers, shared, strict=True)], self.memory.page_bytes
        )
        kept = local_experts(self.config, tensors, largest.num_experts, largest.group_size)

        def laid_out(layer: ExpertLayer, spec: TensorSpec) -> TensorSpec:
            if self._is_small(layer, spec):
                return spec
            layout = tensor_layout(layer.placement, spec.layout.expert_bytes, spec.layout.page_bytes, kept)
            return dataclasses.replace(spec, layout=layout)

        result = [[laid_out(layer, spec) for spec in mine] for layer, mine in zip(layers, specs, strict=True)]
        return kept or len(largest.shard(self.rank)), result

    def _agree(self, layers: Sequence[ExpertLayer], specs: Sequence[Sequence[TensorSpec]]) -> None:
        mine = "\n".join(describe(layer.layer_id, s) for layer, s in zip(layers, specs, strict=True))
        for peer, theirs in enumerate(self.exchange.all_gather(mine.encode())):
            if theirs != mine.encode():
                pairs = zip_longest(mine.split("\n"), theirs.decode().split("\n"), fillvalue="no such layer")
                here, there = next(pair for pair in pairs if pair[0] != pair[1])
                raise DwdpSetupError(f"rank {peer} loaded other experts: here {here}, there {there}")

    def _share(self, position: int, layer: ExpertLayer, specs: Sequence[TensorSpec]) -> None:
        shared = SharedLayer(layer, {}, {}, (), 0, [0] * layer.placement.num_experts)
        placed: dict[str, Placed] = {}
        first = layer.placement.shard(self.rank).start
        slot = None if self.config.view == "direct" else position % self.config.depth
        ranks = range(self.exchange.size)
        with ExitStack() as passing:
            # Mappings hold memory by themselves; what cannot be mapped is held by its blocks.
            holders = [(passing, list(specs))]
            if not self.memory.maps:
                small = [spec for spec in specs if self._is_small(layer, spec)]
                holders = [(self.owned, [spec for spec in specs if spec not in small]), (self.of_small, small)]
            found: list[tuple[str, int, Span, Block]] = []
            for holder, held in holders:
                if held:
                    wanted = {r: [(spec.name, span) for spec in held for span in spec.layout.blocks(r)] for r in ranks}
                    blocks = swap_blocks(self.memory, self.exchange, self.handles, wanted, holder)
                    found += [(name, rank, span, block) for rank in ranks for name, span, block in blocks[rank]]
            for spec in specs:
                self.at = f"layer {layer.layer_id}, {spec.name}"
                parts = [(rank, span, block) for name, rank, span, block in found if name == spec.name]
                shard = layer.shards()[spec.name]
                if self._is_small(layer, spec):
                    self.copies_of_small.append((shared, spec.name, self.placer.replicate(spec, parts, shard, first)))
                    shared.direct[spec.name] = shard.new_empty(layer.placement.num_experts, *spec.tail)
                    continue
                self._count(shared, spec)
                placed[spec.name] = self.placer.share(spec, parts, shard, first, slot)
        for name, result in placed.items():
            shared.direct[name] = result.direct
            if result.staged is not None:
                shared.staged[name] = result.staged
        if slot is not None:
            self._plan(shared, [spec for spec in specs if spec.name in placed], placed)
        self.peak_bytes = max(self.peak_bytes, self.memory.held_bytes - self.held_at_start)
        self.layers.append(shared)  # before it is bound: a failure half-way has to be undone too
        layer.bind(shared.direct)
        self.memory.trim()  # what the layer held, before the next one takes its blocks

    def _is_small(self, layer: ExpertLayer, spec: TensorSpec) -> bool:
        return not layer.is_weight(spec.name) and spec.layout.nbytes < self.config.replicate_below_bytes

    def _count(self, shared: SharedLayer, spec: TensorSpec) -> None:
        self.stored_bytes += spec.layout.stored_bytes(self.rank)
        for expert, nbytes in enumerate(remote_bytes_of_experts(spec.layout, self.rank)):
            shared.remote_bytes[expert] += nbytes

    def _plan(self, shared: SharedLayer, specs: Sequence[TensorSpec], placed: dict[str, Placed]) -> None:
        layouts = {spec.name: spec.layout for spec in specs}
        order = copy_order(layouts, self.rank, self.config.slice_bytes, own=not self.memory.maps)
        pairs = [placed[piece.tensor].pieces(piece) for piece in order]
        # Nothing is left of a slice that lies past the tensor, in its last page.
        shared.copies = [(to, source) for to, source in pairs if source.numel()]
        shared.copy_bytes = sum(source.numel() for _, source in shared.copies)

    def _replicate(self) -> int:
        """Give every rank its own copy of the small tensors; returns their bytes."""
        nbytes = 0
        for shared, name, copy in self.copies_of_small:
            full = copy()
            shared.direct[name] = full
            shared.layer.use({name: full})
            nbytes += full.nbytes
        return nbytes


def share_experts(
    config: DwdpConfig,
    memory: Memory,
    exchange: Exchange,
    layers: Sequence[ExpertLayer],
    ready: Ready | None = None,
) -> SharedExperts:
    """Share the experts of `layers` with the group; all its ranks call this together.

    ready: what else has to work before any rank may serve; called with the layers when they are shared.

    Raises:
        DwdpConfigError: the layers cannot be shared. Nothing was allocated.
        DwdpSetupError: something failed here or on a peer, named with its layer and tensor. Everything that
            was mapped is unmapped again; the model cannot run.
    """
    with ExitStack() as owned:
        sharing = _Sharing(config, memory, exchange, owned, ready)
        owned.callback(sharing.slots.close)
        try:
            result = sharing.run(layers)
        except DwdpConfigError as error:
            exchange.fail(str(error))
            raise
        except BaseException as error:
            reason = f"rank {exchange.rank}, {sharing.at}: {str(error) or type(error).__name__}"
            exchange.fail(reason)
            for shared in sharing.layers:  # no parameter may point into what is unmapped next
                shared.layer.use({name: tensor.new_empty(0) for name, tensor in shared.direct.items()})
            if not isinstance(error, Exception):
                raise
            raise DwdpSetupError(f"sharing the experts failed: {reason}") from error
        if memory.maps:  # views hold the slots' memory from here on; the blocks' descriptors are not needed
            sharing.slots.close()
        return result
