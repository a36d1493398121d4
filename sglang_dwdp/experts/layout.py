"""From experts to pages to segments, and from segments to copies (pure; all sizes in bytes)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, zip_longest

from sglang_dwdp.experts.placement import Placement

# 32 MiB at a time already run at the speed of one large copy, where a rank reads one peer.
MIN_SLICE_BYTES = 32 << 20
# Enough for peers to take turns, and few enough for one driver call to hold a layer's copies from many peers.
SLICES_PER_PEER = 8
# Ranks that read several peers meet at a source now and then, and part sooner if slices are short. Four H200, each of
# which filled its slots again and again from a random moment on, got 275 GB/s each by 2 MiB, 251 by 4 MiB, 236 by 32
# and by 352 MiB, and 245 uncut; as much where a layer is 0.9 GB as where it is 8.5 GB. The larger one's 4,000 short
# slices took 3 ms of the host's time, 31 of the link's.
SHORT_SLICE_BYTES = 2 << 20
MOST_SHORT_SLICES = 8192


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


@dataclass(frozen=True)
class TensorLayout:
    """How the address range of one expert tensor `[num_experts, …]` is divided among the ranks of a group.

    The page is what a rank owns. With the byte boundaries b_0 … b_N of the shards, rank r's segment is the
    pages `ceil(b_r / page) .. ceil(b_{r+1} / page) - 1`. So segments tile the range with no overlap, and an
    expert that begins in the middle of a page has its first bytes in its neighbour's last page.

    With redundant placement a rank also keeps replicas: copies of the pages that follow its segment (past the
    end they go on at 0), which it then reads from its own memory and not from their owner.

    Attributes:
        expert_bytes: bytes of one expert.
        page_bytes: the smallest unit that memory is mapped in.
        num_experts: experts in the tensor.
        segments: `[group_size]`, in rank order; one is empty where a rank's experts fit in its neighbour's page.
        replicas: `[group_size]`, each at most two runs of pages.
    """

    expert_bytes: int
    page_bytes: int
    num_experts: int
    segments: tuple[Span, ...]
    replicas: tuple[tuple[Span, ...], ...]

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

    def stored_bytes(self, rank: int) -> int:
        """What `rank` keeps: its segment and its replicas."""
        return self.segments[rank].nbytes + sum(run.nbytes for run in self.replicas[rank])

    @cached_property
    def blocks(self) -> tuple[tuple[Span, ...], ...]:
        """`[group_size]`: each rank's segment, cut wherever any rank's replicas begin or end.

        A block of memory can only be mapped as a whole, and every rank either maps each of these or has a replica
        of it.
        """
        edges = sorted({edge for runs in self.replicas for run in runs for edge in (run.offset, run.end)})

        def cut_segment(own: Span) -> tuple[Span, ...]:
            points = [own.offset, *(edge for edge in edges if own.offset < edge < own.end), own.end]
            return tuple(Span(low, high - low) for low, high in pairwise(points) if high > low)

        return tuple(map(cut_segment, self.segments))

    @cached_property
    def remote_runs(self) -> tuple[tuple[Span, ...], ...]:
        """`[group_size]`: what each rank reads from peers, as at most two contiguous runs of pages."""
        return tuple(map(self._remote_runs, range(len(self.segments))))

    def _remote_runs(self, rank: int) -> tuple[Span, ...]:
        local = sorted((self.segments[rank], *self.replicas[rank]), key=lambda span: (span.offset, span.nbytes))
        edges = [0, *(edge for span in local if span.nbytes for edge in (span.offset, span.end)), self.reserved_bytes]
        return tuple(Span(low, high - low) for low, high in zip(edges[::2], edges[1::2], strict=True) if high > low)


@lru_cache(maxsize=256)  # layers are alike, and a memory budget is tried with several numbers of local experts
def tensor_layout(
    placement: Placement, expert_bytes: int, page_bytes: int, local_experts: int | None = None
) -> TensorLayout:
    """The layout of an expert tensor.

    Args:
        placement: which rank stores which experts.
        expert_bytes: bytes of one expert.
        page_bytes: the smallest unit that memory is mapped in.
        local_experts: how many experts every rank keeps, its shard included; None for its shard alone.

    Raises:
        ValueError: a size is below 1.
    """
    if expert_bytes < 1 or page_bytes < 1:
        raise ValueError(f"expert_bytes {expert_bytes} and page_bytes {page_bytes} must be at least 1")

    def page_after(expert: int) -> int:
        return -(-expert * expert_bytes // page_bytes) * page_bytes

    edges = [page_after(first) for first in placement.boundaries]
    segments = tuple(Span(low, high - low) for low, high in pairwise(edges))

    def replicas(rank: int) -> tuple[Span, ...]:
        own, past = segments[rank], placement.boundaries[rank] + (local_experts or 0)
        until = edges[-1] if past >= placement.num_experts else page_after(past)
        wrapped = min(page_after(past - placement.num_experts), own.offset) if past > placement.num_experts else 0
        return tuple(run for run in (Span(0, wrapped), Span(own.end, until - own.end)) if run.nbytes > 0)

    kept = tuple(replicas(rank) for rank in range(placement.group_size))
    return TensorLayout(expert_bytes, page_bytes, placement.num_experts, segments, kept)


def cut(span: Span, slice_bytes: int, unit: int) -> Iterator[Span]:
    """`span` in pieces of about `slice_bytes`, at most half as much again; all but the last are whole units.

    Of about equal size: a small rest would cost as much time to start as a whole slice.
    """
    count = max(1, round(span.nbytes / slice_bytes))
    units = -(-span.nbytes // unit)
    edges = [span.offset + min(span.nbytes, units * i // count * unit) for i in range(count + 1)]
    return (Span(low, high - low) for low, high in pairwise(edges) if high > low)


def overlap(a: Span, b: Span) -> Span:
    """What two spans share; of no bytes where they share nothing."""
    low = max(a.offset, b.offset)
    return Span(low, max(0, min(a.end, b.end) - low))


def slice_bytes_for(peer_bytes: int, peers: int) -> int:
    """The size of the slices in which `peer_bytes` bytes of one layer are copied from each of `peers` peers."""
    if peers > 1 and peer_bytes * peers <= MOST_SHORT_SLICES * SHORT_SLICE_BYTES:
        return SHORT_SLICE_BYTES
    return max(MIN_SLICE_BYTES, -(-peer_bytes // SLICES_PER_PEER))


def copy_order(
    layouts: Mapping[str, TensorLayout], rank: int, slice_bytes: int | None = None, *, own: bool = False
) -> Sequence[Slice]:
    """The slices that fill one layer's slot on `rank`, in the order in which they are copied.

    Peers take turns slice by slice, and every rank begins with the peer after itself, so that no source is
    read by all ranks at once (the contention fix of arXiv 2604.01621, section 4.3). Every byte that `rank`
    does not keep appears exactly once.

    Args:
        layouts: of the layer's shared tensors, by name.
        rank: whose slot is filled.
        slice_bytes: about the size of a slice; None for what suits the bytes of each peer (`slice_bytes_for`).
        own: copy the rank's own segments too, first; for slots with room for all of a tensor.
    """
    group_size = len(next(iter(layouts.values())).segments) if layouts else 0
    own_slices = [Slice(name, rank, layout.segments[rank]) for name, layout in layouts.items()] if own else []
    by_peer: list[list[Slice]] = []
    for step in range(1, group_size):
        peer = (rank + step) % group_size
        wanted = [
            (name, overlap(layout.segments[peer], run))
            for name, layout in layouts.items()
            for run in layout.remote_runs[rank]
        ]
        size = slice_bytes or slice_bytes_for(sum(span.nbytes for _, span in wanted), group_size - 1)
        by_peer.append(
            [Slice(name, peer, piece) for name, span in wanted for piece in cut(span, size, layouts[name].page_bytes)]
        )
    return [*own_slices, *(piece for turn in zip_longest(*by_peer) for piece in turn if piece is not None)]


def remote_bytes_of_experts(layout: TensorLayout, rank: int) -> list[int]:
    """`[num_experts]`: how many bytes of each expert `rank` reads from peers."""
    runs = layout.remote_runs[rank]
    experts = [layout.expert_span(range(expert, expert + 1)) for expert in range(layout.num_experts)]
    return [sum(overlap(span, run).nbytes for run in runs) for span in experts]


def slot_of(position: int, depth: int) -> int:
    """The slot that the layer at `position` (in the order of layers) uses, of `depth` slots."""
    return position % depth


def footprint(layers: Sequence[Mapping[str, TensorLayout]], rank: int, depth: int) -> int:
    """Bytes that `rank` takes for the expert tensors of all layers: what it keeps, and `depth` slots.

    A slot has a block for each remote run of each layer shape that uses it (see `SlotMemory`).

    Args:
        layers: `[num_layers]`, layouts by tensor name.
        rank: whose bytes are counted.
        depth: slots; 0 if no forward is staged.
    """
    kept = sum(layout.stored_bytes(rank) for layer in layers for layout in layer.values())
    blocks = {
        (slot_of(position, depth), name, index, run.nbytes)
        for position, layer in enumerate(layers if depth else ())
        for name, layout in layer.items()
        for index, run in enumerate(layout.remote_runs[rank])
    }
    return kept + sum(nbytes for *_, nbytes in blocks)
