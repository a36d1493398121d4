"""Where the bytes of expert tensors are put in memory that can be mapped, and how they are mapped again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from sglang_dwdp.experts.layout import Span, overlap
from sglang_dwdp.experts.stores import OwnExperts, Parts, SharedTensor
from sglang_dwdp.experts.views import SlotMemory, TensorSpec, View
from sglang_dwdp.memory.base import Block, Memory


@dataclass(frozen=True, slots=True)
class _Replicas:
    """Copies that this rank keeps of experts that peers store.

    Attributes:
        owners: a view on the blocks of their owners.
        view: this rank's direct view, which has the copies.
        runs: what the copies' blocks hold.
        pieces: what is fetched, cut where blocks meet.
    """

    owners: View
    view: View
    runs: Sequence[Span]
    pieces: Sequence[Span]


@dataclass(frozen=True, slots=True)
class _Views:
    """The views of a shared tensor; `direct` is `owners` where this rank keeps no replicas of it."""

    spec: TensorSpec
    slot: int | None
    owners: View
    direct: View
    staged: View | None


Placed = Sequence[tuple[int, Block]]  # (offset, block)


@dataclass(frozen=True, slots=True)
class _Places:
    """What each view of a tensor maps, and what `direct` and `staged` have in common."""

    owners: Placed
    local: Placed
    direct: Placed
    staged: Placed


def _by_block(parts: Parts, span: Span) -> Iterator[Span]:
    """`span`, cut where blocks meet: they may lie on different GPUs, and a copy must touch one of them only."""
    for _, held, _ in parts:
        piece = overlap(held, span)
        if piece.nbytes:
            yield piece


class MappedStore:
    """Memory that can be mapped: tensors are views over the blocks of all ranks."""

    def __init__(self, memory: Memory, rank: int, slots: SlotMemory, owned: ExitStack) -> None:
        self._memory, self._rank, self._slots, self._owned = memory, rank, slots, owned
        self._shared: list[_Views] = []
        self._views: list[View] = []
        self._local: list[tuple[View, Span]] = []  # staged view, and what is no slot of it
        self._replicas: list[_Replicas] = []
        self._own: list[tuple[View, Sequence[Span]]] = []  # blocks with experts of this rank

    def _view(self, spec: TensorSpec, placed: Placed) -> View:
        view = View(self._memory, spec, placed)
        self._owned.callback(view.close)
        return view

    def share(self, spec: TensorSpec, parts: Parts, shard: torch.Tensor, first: int, slot: int | None) -> SharedTensor:
        """Store this rank's experts, and join them with those of the peers.

        Args:
            spec: the tensor.
            parts: the blocks of all ranks.
            shard: this rank's experts.
            first: the number of the first of them.
            slot: for staged forwards; None without them.
        """
        experts = spec.layout.expert_span(range(first, first + len(shard)))
        runs = spec.layout.replicas[self._rank]
        with ExitStack() as temporary:
            places = self._places(spec, parts, slot, temporary)
            owners = self._view(spec, places.owners)
            own = OwnExperts(shard.dtype, shard.shape, [owners.piece(piece) for piece in _by_block(parts, experts)])
            own.write(shard)
            direct = self._view(spec, places.direct) if runs else owners
            staged = self._view(spec, places.staged) if slot is not None else None
        self._own.append((owners, [held for _, held, _ in parts if overlap(held, experts).nbytes]))
        if runs:
            pieces = [piece for run in runs for piece in _by_block(parts, run)]
            self._replicas.append(_Replicas(owners, direct, runs, pieces))
        if staged is not None:
            self._local += [(staged, Span(offset, block.nbytes)) for offset, block in places.local]
        self._views.append(direct)
        self._shared.append(_Views(spec, slot, owners, direct, staged))
        target = staged or direct
        return SharedTensor(
            direct.tensor,
            staged.tensor if staged else None,
            own,
            lambda piece: (target.piece(piece.span), direct.piece(piece.span)),
        )

    def _places(self, spec: TensorSpec, parts: Parts, slot: int | None, temporary: ExitStack) -> _Places:
        """Where blocks are mapped; `temporary` closes those of replicas, whose memory views hold."""
        owners = [(span.offset, block) for _, span, block in parts]
        local = [(span.offset, block) for owner, span, block in parts if owner == self._rank]
        runs = spec.layout.replicas[self._rank]
        for run in runs:
            block = self._memory.create(run.nbytes)
            temporary.callback(block.close)
            local.append((run.offset, block))
        peers = [
            (span.offset, block)
            for owner, span, block in parts
            if owner != self._rank and not any(run.offset <= span.offset < run.end for run in runs)
        ]
        slots = self._slots.blocks(slot, spec) if slot is not None else []
        return _Places(owners, local, [*local, *peers], [*local, *slots])

    def release(self) -> None:
        """Give this rank's hold on all experts up, and on slots; addresses stay. No tensor must be used meanwhile.

        What peers have mapped goes when they do the same.
        """
        for views in self._shared:
            for view in {id(view): view for view in (views.owners, views.direct, views.staged) if view}.values():
                view.vacate()
        self._slots.forget()

    def restore(self, blocks: Callable[[Sequence[TensorSpec], ExitStack], Mapping[str, Parts]]) -> None:
        """Map new memory where `release` left none; what it holds has to be written.

        Args:
            blocks: the blocks of all ranks for the tensors of one layer, by name; all ranks ask for the same, in the
                same order.
        """
        for layer in self._by_layer():
            with ExitStack() as temporary:
                parts = blocks([views.spec for views in layer], temporary)
                for views in layer:
                    places = self._places(views.spec, parts[views.spec.name], views.slot, temporary)
                    views.owners.map_again(places.owners)
                    if views.direct is not views.owners:
                        views.direct.map_again(places.direct)
                    if views.staged is not None:
                        views.staged.map_again(places.staged)
        self._slots.close()
        self._protect()

    def _by_layer(self) -> Iterator[Sequence[_Views]]:
        """The views of tensors that were shared together: a name that comes again is another layer's."""
        layer: list[_Views] = []
        for views in self._shared:
            if any(views.spec.name == other.spec.name for other in layer):
                yield layer
                layer = []
            layer.append(views)
        yield layer

    def finish(self) -> None:
        """All ranks have written: fetch replicas, and make everything read-only."""
        self._fetch()
        self._protect()

    def _protect(self) -> None:
        for view in (*self._views, *(replicas.owners for replicas in self._replicas)):
            view.protect()
        for staged, span in self._local:
            staged.protect(span)

    @contextmanager
    def writable(self) -> Iterator[None]:
        """The `own` of all tensors can be written meanwhile."""
        with ExitStack() as stack:
            for view, spans in self._own:
                stack.enter_context(view.writable(spans))
            yield

    def refresh(self) -> None:
        """All ranks have written anew: fetch replicas again."""
        with ExitStack() as stack:
            for replicas in self._replicas:
                stack.enter_context(replicas.view.writable(replicas.runs))
            self._fetch()

    def _fetch(self) -> None:
        for replicas in self._replicas:
            for piece in replicas.pieces:
                replicas.view.piece(piece).copy_(replicas.owners.piece(piece))
