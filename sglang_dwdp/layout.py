"""From experts to pages to segments, and from segments to copies (pure; all sizes in bytes)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from sglang_dwdp.placement import Placement


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes `offset .. offset + nbytes - 1` of an expert tensor's address range."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of a copy: `span` of one expert tensor, read from the rank `owner`."""

    tensor: str
    owner: int
    span: Span


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """How the address range of one expert tensor `[num_experts, …]` is divided among the ranks of a group.

    The page is what a rank owns. With the byte boundaries b_0 … b_N of the shards, rank r's segment is the
    pages `ceil(b_r / page) .. ceil(b_{r+1} / page) - 1`. So segments tile the range with no overlap, and an
    expert that begins in the middle of a page has its first bytes in its neighbour's last page.

    expert_bytes: bytes of one expert.  page_bytes: the smallest unit that memory is mapped in.
    segments: `[group_size]`, in rank order; one is empty where a rank's experts fit in its neighbour's page.
    """

    expert_bytes: int
    page_bytes: int
    num_experts: int
    segments: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return self.num_experts * self.expert_bytes

    @property
    def reserved_bytes(self) -> int:
        """Size of the address range: the tensor, rounded up to whole pages."""
        return self.segments[-1].end

    def expert_span(self, experts: range) -> Span:
        """The bytes of consecutive experts, as whatever segments they lie in."""
        return Span(experts.start * self.expert_bytes, len(experts) * self.expert_bytes)

    def remote_runs(self, rank: int) -> tuple[Span, ...]:
        """What `rank` does not own, as at most two contiguous runs of pages: before its segment and after."""
        own = self.segments[rank]
        if own.nbytes == 0:
            return (Span(0, self.reserved_bytes),)
        runs = (Span(0, own.offset), Span(own.end, self.reserved_bytes - own.end))
        return tuple(run for run in runs if run.nbytes)


def tensor_layout(placement: Placement, expert_bytes: int, page_bytes: int) -> TensorLayout:
    """The layout of an expert tensor of `expert_bytes` per expert in pages of `page_bytes`."""
    if expert_bytes < 1 or page_bytes < 1:
        raise ValueError(f"expert_bytes {expert_bytes} and page_bytes {page_bytes} must be at least 1")
    edges = [-(-first * expert_bytes // page_bytes) * page_bytes for first in placement.boundaries]
    segments = tuple(Span(low, high - low) for low, high in pairwise(edges))
    return TensorLayout(expert_bytes, page_bytes, placement.num_experts, segments)


def cut(span: Span, slice_bytes: int) -> Iterator[Span]:
    """`span` in pieces of `slice_bytes`, the last one shorter."""
    for offset in range(span.offset, span.end, slice_bytes):
        yield Span(offset, min(slice_bytes, span.end - offset))


def copy_order(layouts: dict[str, TensorLayout], rank: int, slice_bytes: int) -> Sequence[Slice]:
    """The slices that fill one layer's slot on `rank`, in the order in which they are copied.

    Peers take turns slice by slice, and every rank begins with the peer after itself, so that no source is
    read by all ranks at once (the contention fix of arXiv 2604.01621, section 4.3). Every byte that `rank`
    does not own appears exactly once. With one peer there is nobody to take turns with, so nothing is cut: a
    large copy is faster than many small ones.
    """
    group_size = len(next(iter(layouts.values())).segments) if layouts else 0
    by_peer: list[list[Slice]] = []
    for step in range(1, group_size):
        peer = (rank + step) % group_size
        by_peer.append(
            [
                Slice(name, peer, piece)
                for name, layout in layouts.items()
                for piece in (cut(layout.segments[peer], slice_bytes) if group_size > 2 else [layout.segments[peer]])
                if piece.nbytes
            ]
        )
    return [piece for turn in zip_longest(*by_peer) for piece in turn if piece is not None]


def remote_bytes_of_experts(layout: TensorLayout, rank: int) -> list[int]:
    """`[num_experts]`: how many bytes of each expert lie in memory that `rank` does not own."""
    own = layout.segments[rank]
    result = []
    for expert in range(layout.num_experts):
        span = layout.expert_span(range(expert, expert + 1))
        local = max(0, min(span.end, own.end) - max(span.offset, own.offset))
        result.append(span.nbytes - local)
    return result
