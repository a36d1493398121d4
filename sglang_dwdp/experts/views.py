"""Direct and staged views: contiguous expert tensors whose pages lie in several places.

```
direct   [ rank 0's block | rank 1's block | rank 2's block ]   remote pages are the peers' own memory
staged   [ slot           | rank 1's block | slot           ]   remote pages are copies (here on rank 1)
```
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from sglang_dwdp.experts.layer import ExpertTensor
from sglang_dwdp.experts.layout import Span, TensorLayout
from sglang_dwdp.memory.base import Block, Memory


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An expert tensor and how it is laid out.

    Attributes:
        tensor: name, dtype and the shape of an expert.
        layout: where its bytes lie.
    """

    tensor: ExpertTensor
    layout: TensorLayout

    @property
    def name(self) -> str:
        return self.tensor.name

    def shape(self, raw: torch.Tensor) -> torch.Tensor:
        """`raw`, uint8 `[nbytes]`, as the tensor `[num_experts, *expert_shape]` of its dtype. No copy."""
        return raw.view(self.tensor.dtype).view(self.layout.num_experts, *self.tensor.expert_shape)


class View:
    """One expert tensor over a range of its own, writable until `protect` and in `writable`; unmapped by `close`.

    Args:
        memory: that the blocks are of.
        spec: the tensor.
        placed: (offset, block); together they tile the tensor's range.
    """

    def __init__(self, memory: Memory, spec: TensorSpec, placed: Iterable[tuple[int, Block]]) -> None:
        self._spec = spec
        self._pages = memory.reserve(spec.layout.reserved_bytes)
        try:
            for offset, block in placed:
                self._pages.map(offset, block)
            self.bytes = self._pages.tensor(spec.layout.nbytes)
            self.tensor = spec.shape(self.bytes)
        except BaseException:
            self._pages.close()
            raise

    def piece(self, span: Span) -> torch.Tensor:
        """The bytes of `span` that belong to the tensor (the last page may reach past its end). uint8."""
        return self.bytes[span.offset : min(span.end, self._spec.layout.nbytes)]

    def protect(self, span: Span | None = None) -> None:
        """Make what blocks hold of the view read-only in this process: those of `span`, or all."""
        span = span or Span(0, self._pages.nbytes)
        self._pages.protect(span.offset, span.nbytes)

    def vacate(self) -> None:
        """Unmap all blocks, and keep the addresses. The tensors must not be used before `map_again`."""
        self._pages.vacate()

    def map_again(self, placed: Iterable[tuple[int, Block]]) -> None:
        """Map blocks as at first, after `vacate`; writable until `protect`. What they hold is what the tensors have."""
        for offset, block in placed:
            self._pages.map(offset, block)

    @contextmanager
    def writable(self, spans: Sequence[Span]) -> Iterator[None]:
        """What whole blocks hold at `spans` can be written meanwhile, and is read-only afterwards."""
        try:
            for span in spans:
                self._pages.allow_writes(span.offset, span.nbytes)
            yield
        finally:
            for span in spans:
                self._pages.protect(span.offset, span.nbytes)

    def close(self) -> None:
        """Unmap. The tensors must not be used any more. Idempotent."""
        empty = torch.empty(0, dtype=torch.uint8)
        self.bytes, self.tensor = empty, empty
        self._pages.close()


class SlotMemory:
    """The blocks of `depth` slots, made when first asked for and shared by all layers that use a slot.

    A block can only be mapped as a whole, so a slot has one for each contiguous run of remote pages. Layers of equal
    shape share them; a layer of another shape gets blocks of its own.
    """

    def __init__(self, memory: Memory, rank: int) -> None:
        self._memory = memory
        self._rank = rank
        self._blocks: dict[tuple[int, str, int, int], Block] = {}

    def blocks(self, slot: int, spec: TensorSpec) -> list[tuple[int, Block]]:
        """The blocks that `spec` has in `slot`, as (offset, block).

        They hold its remote runs if memory can be mapped, else all of it.
        """
        everything = (Span(0, spec.layout.reserved_bytes),)
        runs = spec.layout.remote_runs[self._rank] if self._memory.maps else everything
        result = []
        for index, run in enumerate(runs):
            key = (slot, spec.name, index, run.nbytes)
            if key not in self._blocks:
                self._blocks[key] = self._memory.create(run.nbytes)
            result.append((run.offset, self._blocks[key]))
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together."""
        return sum(nbytes for _, _, _, nbytes in self._blocks)

    def forget(self) -> None:
        """Make blocks anew when they are asked for; those that there were have been closed."""
        self._blocks.clear()

    def close(self) -> None:
        """Give the blocks up; views that map them keep the memory. Idempotent."""
        with ExitStack() as closing:  # goes on after one that fails
            for block in self._blocks.values():
                closing.callback(block.close)
