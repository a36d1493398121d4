"""Direct and staged views: contiguous expert tensors whose pages lie in several places.

```
direct   [ rank 0's block | rank 1's block | rank 2's block ]   remote pages are the peers' own memory
staged   [ slot           | rank 1's block | slot           ]   remote pages are copies (here on rank 1)
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from sglang_dwdp.layout import Span, TensorLayout
from sglang_dwdp.memory.base import Block, Memory, Range


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One expert tensor of a layer, the same on all ranks.

    tail: shape of one expert's part.
    """

    name: str
    dtype: torch.dtype
    tail: tuple[int, ...]
    layout: TensorLayout

    def shape(self, raw: torch.Tensor) -> torch.Tensor:
        """`raw`, uint8 `[nbytes]`, as the tensor `[num_experts, *tail]` of this dtype. No copy."""
        return raw.view(self.dtype).view(self.layout.num_experts, *self.tail)


class View:
    """One expert tensor over a range of its own; unmapped by `close`."""

    def __init__(self, spec: TensorSpec, pages: Range) -> None:
        self._pages = pages
        self._spec = spec
        self.bytes = pages.tensor(spec.layout.nbytes)
        self.tensor = spec.shape(self.bytes)

    def piece(self, span: Span) -> torch.Tensor:
        """The bytes of `span` that belong to the tensor (the last page may reach past its end). uint8."""
        return self.bytes[span.offset : min(span.end, self._spec.layout.nbytes)]

    def protect(self) -> None:
        """Make the whole view read-only in this process."""
        self._pages.protect(0, self._pages.nbytes)

    def close(self) -> None:
        """Unmap. The tensors must not be used any more. Idempotent."""
        empty = torch.empty(0, dtype=torch.uint8)
        self.bytes, self.tensor = empty, empty
        self._pages.close()


def direct_view(memory: Memory, spec: TensorSpec, blocks: Mapping[int, Block]) -> View:
    """A view on every rank's own memory, writable until `View.protect`.

    blocks: each rank's block, for the ranks whose segment is not empty.
    """
    placed = [(spec.layout.segments[rank].offset, block) for rank, block in blocks.items()]
    return _view(memory, spec, placed)


def staged_view(memory: Memory, spec: TensorSpec, rank: int, own: Block | None, slot: Sequence[Block]) -> View:
    """A view on `rank`'s own memory and, everywhere else, on a slot's.

    own: this rank's block, None where its segment is empty.
    slot: one block for each of `layout.remote_runs(rank)`, of that size.
    """
    runs = spec.layout.remote_runs(rank)
    placed = [(run.offset, block) for run, block in zip(runs, slot, strict=True)]
    if own is not None:
        placed.append((spec.layout.segments[rank].offset, own))
    return _view(memory, spec, placed)


def _view(memory: Memory, spec: TensorSpec, placed: Sequence[tuple[int, Block]]) -> View:
    with ExitStack() as undo:
        pages = memory.reserve(spec.layout.reserved_bytes)
        undo.callback(pages.close)
        for offset, block in placed:
            pages.map(offset, block)
        view = View(spec, pages)
        undo.pop_all()
    return view


class SlotMemory:
    """The blocks of `depth` slots, made when first asked for and shared by all layers that use a slot.

    A handle can only be mapped whole, so a slot has one block for each contiguous run of remote pages. Layers
    of equal shape share them; a layer of another shape gets blocks of its own.
    """

    def __init__(self, memory: Memory, rank: int) -> None:
        self._memory = memory
        self._rank = rank
        self._blocks: dict[tuple[int, str, int, int], Block] = {}

    def blocks(self, slot: int, spec: TensorSpec) -> list[Block]:
        """The blocks that `staged_view` wants for `spec` in `slot`."""
        result = []
        for index, run in enumerate(spec.layout.remote_runs(self._rank)):
            key = (slot, spec.name, index, run.nbytes)
            if key not in self._blocks:
                self._blocks[key] = self._memory.create(run.nbytes)
            result.append(self._blocks[key])
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together."""
        return sum(nbytes for _, _, _, nbytes in self._blocks)

    def close(self) -> None:
        """Give the blocks up; views that map them keep the memory. Idempotent."""
        for block in self._blocks.values():
            block.close()
