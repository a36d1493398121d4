"""Stores: where the bytes of expert tensors are put, in memory that can be mapped and in memory that cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from sglang_dwdp.experts.layout import Slice, Span, overlap
from sglang_dwdp.experts.views import SlotMemory, TensorSpec, View
from sglang_dwdp.memory.base import Block, Memory

Parts = Sequence[tuple[int, Span, Block]]  # (owner, what it holds, block): together, all of a tensor


@dataclass(frozen=True, slots=True)
class OwnExperts:
    """The experts of one tensor that this rank stores, where peers read them.

    Attributes:
        dtype: of the tensor.
        shape: `[len(shard), …]`.
        pieces: their bytes in order, uint8. Cut where blocks meet, since a copy must not touch two of them.
    """

    dtype: torch.dtype
    shape: torch.Size
    pieces: Sequence[torch.Tensor]

    def read(self) -> torch.Tensor:
        """A copy on the host."""
        raw = torch.cat([piece.cpu() for piece in self.pieces])
        return raw.view(self.dtype).view(self.shape)

    def write(self, experts: torch.Tensor) -> None:
        """Overwrite them with experts of equal shape and dtype; within a store's `writable` only."""
        source, offset = _bytes(experts), 0
        for piece in self.pieces:
            piece.copy_(source[offset : offset + piece.numel()])
            offset += piece.numel()


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """One expert tensor of one layer, shared.

    Attributes:
        direct: what direct forwards bind; the staged tensor where memory cannot be mapped.
        staged: what staged forwards bind; None where there are none.
        own: this rank's experts, where peers read them.
        pieces: (destination, source) of a slice, uint8.
    """

    direct: torch.Tensor
    staged: torch.Tensor | None
    own: OwnExperts
    pieces: Callable[[Slice], tuple[torch.Tensor, torch.Tensor]]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


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
        self._views: list[View] = []
        self._local: list[tuple[View, Span]] = []  # staged view, and what is no slot of it
        self._replicas: list[_Replicas] = []
        self._own: list[tuple[View, Sequence[Span]]] = []  # blocks with experts of this rank

    def _view(self, spec: TensorSpec, placed: Sequence[tuple[int, Block]]) -> View:
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
        direct = self._view(spec, [(span.offset, block) for _, span, block in parts])
        experts = spec.layout.expert_span(range(first, first + len(shard)))
        own = OwnExperts(shard.dtype, shard.shape, [direct.piece(piece) for piece in _by_block(parts, experts)])
        own.write(shard)
        self._own.append((direct, [held for _, held, _ in parts if overlap(held, experts).nbytes]))
        runs = spec.layout.replicas[self._rank]
        local = [(span.offset, block) for owner, span, block in parts if owner == self._rank]
        with ExitStack() as temporary:  # the views hold the memory of replicas
            for run in runs:
                block = self._memory.create(run.nbytes)
                temporary.callback(block.close)
                local.append((run.offset, block))
            if runs:
                owners = direct
                peers = [
                    (span.offset, block)
                    for owner, span, block in parts
                    if owner != self._rank and not any(run.offset <= span.offset < run.end for run in runs)
                ]
                direct = self._view(spec, [*local, *peers])
                pieces = [piece for run in runs for piece in _by_block(parts, run)]
                self._replicas.append(_Replicas(owners, direct, runs, pieces))
            staged = self._staged(spec, local, slot)
        self._views.append(direct)
        target = staged or direct
        return SharedTensor(
            direct.tensor,
            staged.tensor if staged else None,
            own,
            lambda piece: (target.piece(piece.span), direct.piece(piece.span)),
        )

    def _staged(self, spec: TensorSpec, local: Sequence[tuple[int, Block]], slot: int | None) -> View | None:
        if slot is None:
            return None
        view = self._view(spec, [*local, *self._slots.blocks(slot, spec)])
        self._local += [(view, Span(offset, block.nbytes)) for offset, block in local]
        return view

    def finish(self) -> None:
        """All ranks have written: fetch replicas, and make everything read-only."""
        self._fetch()
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


class UnmappedStore:
    """Memory that cannot be mapped: experts stay in their owners' blocks, and slots have room for all of a tensor."""

    def __init__(self, rank: int, slots: SlotMemory) -> None:
        self._rank, self._slots = rank, slots

    def share(self, spec: TensorSpec, parts: Parts, shard: torch.Tensor, first: int, slot: int | None) -> SharedTensor:
        """As `MappedStore.share`."""
        (block,) = (block for owner, _, block in parts if owner == self._rank)  # a page is a byte: its experts alone
        own = OwnExperts(shard.dtype, shard.shape, [block.tensor()])
        own.write(shard)
        assert slot is not None, "without views every forward is staged"
        ((_, block),) = self._slots.blocks(slot, spec)
        staged = block.tensor()
        sources = {owner: (span.offset, block.tensor()) for owner, span, block in parts}

        def pieces(piece: Slice) -> tuple[torch.Tensor, torch.Tensor]:
            start, source = sources[piece.owner]
            span = piece.span
            return staged[span.offset : span.end], source[span.offset - start : span.end - start]

        tensor = spec.shape(staged)
        return SharedTensor(tensor, tensor, own, pieces)

    def finish(self) -> None:
        """Nothing is mapped, so nothing can be protected."""

    @contextmanager
    def writable(self) -> Iterator[None]:
        """As `MappedStore.writable`."""
        yield

    def refresh(self) -> None:
        """There are no replicas: with one, an owner's block would be cut."""
