"""Where the bytes of expert tensors are put, where memory cannot be mapped; `mapped_store.py` where it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.experts.layout import Slice, Span
from sglang_dwdp.experts.views import SlotMemory, TensorSpec
from sglang_dwdp.memory.base import Block

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

    def release(self) -> None:
        """Unsupported.

        Raises:
            DwdpRuntimeError: always.
        """
        raise DwdpRuntimeError("memory that cannot be mapped cannot be released and found again at its addresses.")

    def restore(self, blocks: Callable[[Sequence[TensorSpec], ExitStack], Mapping[str, Parts]]) -> None:
        """As `release`."""
        self.release()
