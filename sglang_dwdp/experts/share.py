"""Sharing the experts of a model among the ranks of a group: once, before serving.

The ranks decide how many experts each keeps, agree on what they have loaded, and lay the tensors out. Then, layer by
layer, every rank makes blocks for its segment of each tensor, swaps their handles with its peers, stores its experts
(`stores`), and lets the engine free its own copy. So set-up never holds much more than the experts that the rank
keeps, the slots and one layer. Small tensors go to all ranks as they are, with the handles; copies of peers' experts
that a rank keeps (--dwdp-local-experts) are fetched from their owners when all have written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError, DwdpSetupError
from sglang_dwdp.experts.budget import choose_local_experts
from sglang_dwdp.experts.layer import ExpertLayer, ExpertTensor, describe, tensors_of
from sglang_dwdp.experts.layout import Span, copy_order, remote_bytes_of_experts, slot_of, tensor_layout
from sglang_dwdp.experts.mapped_store import MappedStore
from sglang_dwdp.experts.stores import OwnExperts, Parts, SharedTensor, UnmappedStore
from sglang_dwdp.experts.views import SlotMemory, TensorSpec
from sglang_dwdp.memory.agreement import check_same
from sglang_dwdp.memory.base import Block, CopyList, Memory
from sglang_dwdp.memory.handles import swap_blocks
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.messages import pack, unpack


@dataclass(slots=True)
class SharedLayer:
    """A MoE layer whose experts are shared.

    Attributes:
        layer: the engine's layer.
        direct: the tensors that direct forwards bind, by name; the staged ones where memory cannot be mapped.
        staged: those that staged forwards bind: only the shared ones, and none where no forward is staged.
        own: what this rank stores of the shared ones.
        copies: what fills the layer's slot.
        copied_from: bytes of that, by the rank that stores them.
        remote_bytes: `[num_experts]`, bytes of each expert that lie in peers' memory.
    """

    layer: ExpertLayer
    direct: dict[str, torch.Tensor]
    staged: dict[str, torch.Tensor]
    own: dict[str, OwnExperts]
    copies: CopyList
    remote_bytes: list[int]
    copied_from: dict[int, int] = field(default_factory=dict)

    @property
    def copy_bytes(self) -> int:
        """Bytes that fill the layer's slot."""
        return sum(source.numel() for _, source in self.copies)

    def describe_copies(self) -> str:
        """The layer, and what fills its slot from where."""
        sources = [f"{nbytes} bytes from rank {rank}" for rank, nbytes in sorted(self.copied_from.items())]
        return f"layer {self.layer.layer_id}, {' and '.join(sources)}"


Ready = Callable[[Sequence[SharedLayer]], None]


@dataclass(slots=True)
class SharedExperts:
    """Everything that set-up made; `close` takes it down in reverse order.

    Attributes:
        layers: in the order in which the model runs them.
        local_experts: how many experts of a layer this rank keeps.
        stored_bytes: what this rank keeps of shared tensors.
        slot_bytes: what the slots take.
        replicated_bytes: what tensors take that every rank has a copy of.
        peak_bytes: the most that set-up held for experts at a time, with what the engine had loaded.
        store: where experts of peers and of this rank lie; None before set-up.
        stack: what is to be unmapped and closed.
    """

    layers: list[SharedLayer] = field(default_factory=list)
    local_experts: int = 0
    stored_bytes: int = 0
    slot_bytes: int = 0
    replicated_bytes: int = 0
    peak_bytes: int = 0
    store: MappedStore | UnmappedStore | None = field(default=None, repr=False)
    stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def close(self) -> None:
        """Unbind and unmap. Idempotent. The model cannot run afterwards."""
        _unbind(self.layers)
        self.layers = []
        self.store = None
        self.stack.close()


def _unbind(layers: Sequence[SharedLayer]) -> None:
    """Let no parameter point into what is unmapped next."""
    for shared in layers:
        shared.layer.use({name: tensor.new_empty(0) for name, tensor in shared.direct.items()})


class _Sharing:
    """The work of `share_experts`: its steps, and what they hand on."""

    def __init__(
        self, config: DwdpConfig, memory: Memory, exchange: Exchange, owned: ExitStack, ready: Ready | None
    ) -> None:
        self.config, self.memory, self.exchange, self.owned, self.ready = config, memory, exchange, owned, ready
        self.rank = exchange.rank
        self.slots = SlotMemory(memory, self.rank)
        self.store = (
            MappedStore(memory, self.rank, self.slots, owned) if memory.maps else UnmappedStore(self.rank, self.slots)
        )
        self.result = SharedExperts()
        self.held = ExitStack()  # the blocks of the last layer
        self.held_at_start = 0
        self.at = "start"

    def run(self, layers: Sequence[ExpertLayer]) -> SharedExperts:
        self.exchange.connect()
        tensors = [tensors_of(layer, self.rank) for layer in layers]
        sizes = [
            (layer.placement, {tensor.name: tensor.expert_bytes for tensor in of_layer if not tensor.replicated})
            for layer, of_layer in zip(layers, tensors, strict=True)
        ]
        kept = choose_local_experts(self.config, sizes, self.memory.page_bytes)
        self._agree(layers, tensors, kept)
        self.memory.trim()
        loaded = sum(tensor.nbytes for layer in layers for tensor in layer.shards().values())
        self.held_at_start = self.memory.held_bytes - loaded
        for position, layer in enumerate(layers):
            self.at = f"layer {layer.layer_id}"
            self._share(position, layer, tensors[position], kept)
        self.at = "last steps"
        self.memory.finish_writes()
        self.exchange.barrier()  # every rank has written its experts, and so imported the last layer's blocks
        self.held.close()
        self.store.finish()
        self.memory.finish_writes()
        if self.ready is not None:
            self.ready(self.result.layers)
        self.exchange.barrier()  # no rank serves while another may still fail
        self.result.local_experts = kept or max(len(layer.placement.shard(self.rank)) for layer in layers)
        self.result.slot_bytes = self.slots.nbytes
        self.result.store = self.store
        self.result.stack = self.owned.pop_all()
        return self.result

    def _agree(
        self, layers: Sequence[ExpertLayer], tensors: Sequence[Sequence[ExpertTensor]], kept: int | None
    ) -> None:
        lines = [describe(*pair, kept, self.memory.page_bytes) for pair in zip(layers, tensors, strict=True)]
        check_same(self.exchange, lines, "loaded other experts")

    def _share(self, position: int, layer: ExpertLayer, tensors: Sequence[ExpertTensor], kept: int | None) -> None:
        specs = [
            TensorSpec(tensor, tensor_layout(layer.placement, tensor.expert_bytes, self.memory.page_bytes, kept))
            for tensor in tensors
            if not tensor.replicated
        ]
        shared = SharedLayer(layer, {}, {}, {}, (), [0] * layer.placement.num_experts)
        results: dict[str, SharedTensor] = {}
        first = layer.placement.shard(self.rank).start
        staged = self.config.views(maps=self.memory.maps).staged
        slot = slot_of(position, self.config.depth) if staged else None
        shards = layer.shards()
        small = [tensor.name for tensor in tensors if tensor.replicated]
        # Mappings hold memory by themselves; what cannot be mapped is held by its blocks.
        held = ExitStack()
        self.owned.callback(held.close)
        parts, full = self._swap(specs, [shards[name] for name in small], held if self.memory.maps else self.owned)
        self.held.close()  # peers have sent this layer's handles, so they have imported the last layer's blocks
        self.held = held
        shared.direct.update(zip(small, full, strict=True))
        for spec in specs:
            self.at = f"layer {layer.layer_id}, {spec.name}"
            self.result.stored_bytes += spec.layout.stored_bytes(self.rank)
            for expert, nbytes in enumerate(remote_bytes_of_experts(spec.layout, self.rank)):
                shared.remote_bytes[expert] += nbytes
            results[spec.name] = self.store.share(spec, parts[spec.name], shards[spec.name], first, slot)
        for name, result in results.items():
            shared.direct[name], shared.own[name] = result.direct, result.own
            if result.staged is not None:
                shared.staged[name] = result.staged
        if slot is not None:
            order = copy_order({spec.name: spec.layout for spec in specs}, self.rank, own=not self.memory.maps)
            pairs = [results[piece.tensor].pieces(piece) for piece in order]
            for piece, (_, source) in zip(order, pairs, strict=True):
                shared.copied_from[piece.owner] = shared.copied_from.get(piece.owner, 0) + source.numel()
            # Nothing is left of a slice that lies past the tensor, in its last page.
            shared.copies = [(to, source) for to, source in pairs if source.numel()]
        self.result.peak_bytes = max(self.result.peak_bytes, self.memory.held_bytes - self.held_at_start)
        self.result.layers.append(shared)  # before it is bound: if binding fails, it has to be undone too
        layer.bind(shared.direct)
        self.memory.trim()  # what the layer held, before the next one takes its blocks

    def _swap(
        self, specs: Sequence[TensorSpec], small: Sequence[torch.Tensor], stack: ExitStack
    ) -> tuple[dict[str, Parts], list[torch.Tensor]]:
        """Swap a layer's tensors with the peers.

        Args:
            specs: The tensors that are shared.
            small: `[experts of this rank, …]`, those that every rank gets all of; through the host.
            stack: Closes the blocks.

        Returns:
            The blocks of all ranks, by tensor; the small tensors of all experts, `[num_experts, …]`.
        """
        raw = [shard.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for shard in small]
        parts, payloads = blocks_of_all(self.memory, self.exchange, specs, stack, pack(raw))
        pieces = zip(*map(unpack, payloads), strict=True)  # of each small tensor, those of all ranks
        return parts, [self._joined(shard, of_all) for shard, of_all in zip(small, pieces, strict=True)]

    def _joined(self, shard: torch.Tensor, pieces: Sequence[bytes]) -> torch.Tensor:
        """A tensor of all experts, like `shard`, of the bytes of each rank's experts."""
        full = torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8).to(shard.device, copy=True)
        full = full.view(shard.dtype).view(-1, *shard.shape[1:])
        self.result.replicated_bytes += full.nbytes
        return full


def blocks_of_all(
    memory: Memory, exchange: Exchange, specs: Sequence[TensorSpec], stack: ExitStack, payload: bytes = b""
) -> tuple[dict[str, Parts], list[bytes]]:
    """Make this rank's blocks for these tensors, and get those of the peers.

    Args:
        memory: of this rank.
        exchange: with the group, whose ranks all call this.
        specs: the tensors.
        stack: closes the blocks.
        payload: what else this rank has for all.

    Returns:
        The blocks of all ranks, by tensor name; the payload of each rank.
    """
    ranks = range(exchange.size)
    spans = [[(spec.name, span) for spec in specs for span in spec.layout.blocks[rank]] for rank in ranks]
    sizes = [[span.nbytes for _, span in of_rank] for of_rank in spans]
    blocks, payloads = swap_blocks(memory, exchange, sizes, stack, payload)
    parts: dict[str, list[tuple[int, Span, Block]]] = {spec.name: [] for spec in specs}
    for rank in ranks:
        for (name, span), block in zip(spans[rank], blocks[rank], strict=True):
            parts[name].append((rank, span, block))
    return dict(parts), payloads


def share_experts(
    config: DwdpConfig, memory: Memory, exchange: Exchange, layers: Sequence[ExpertLayer], ready: Ready | None = None
) -> SharedExperts:
    """Share the experts of `layers` with the group; all its ranks call this together.

    Args:
        config: the options, the same on all ranks.
        memory: of this rank.
        exchange: with the ranks of the group, not connected yet.
        layers: in the order in which the model runs them.
        ready: what else has to work before any rank may serve; called with the layers when they are shared.

    Raises:
        DwdpConfigError: the layers cannot be shared; nothing was allocated.
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
            _unbind(sharing.result.layers)
            if not isinstance(error, Exception):
                raise
            raise DwdpSetupError(f"sharing the experts failed: {reason}") from error
        if memory.maps:  # views hold the slots' memory from here on; the blocks' descriptors are not needed
            sharing.slots.close()
        return result
