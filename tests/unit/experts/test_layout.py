"""Layouts by hand and by property: segments tile, every byte has one owner, plans cover what is remote once."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.experts.layout import (
    MIN_SLICE_BYTES,
    MOST_SHORT_SLICES,
    SHORT_SLICE_BYTES,
    Span,
    TensorLayout,
    copy_order,
    cut,
    footprint,
    overlap,
    remote_bytes_of_experts,
    slice_bytes_for,
    tensor_layout,
)
from sglang_dwdp.experts.placement import balanced


@st.composite
def layouts(draw: st.DrawFn) -> tuple[TensorLayout, int]:
    group_size = draw(st.integers(1, 6))
    num_experts = draw(st.integers(group_size, 24))
    page = draw(st.sampled_from([1, 7, 16, 64]))
    # from far below a page to several pages, whole multiples of it included
    expert_bytes = draw(st.one_of(st.integers(1, 4 * page + 3), st.integers(1, 4).map(lambda n: n * page)))
    local_experts = draw(st.one_of(st.none(), st.integers(-(-num_experts // group_size), num_experts)))
    return tensor_layout(balanced(num_experts, group_size), expert_bytes, page, local_experts), group_size


def bytes_of(spans: Iterable[Span]) -> Counter[int]:
    return Counter(byte for span in spans for byte in range(span.offset, span.end))


def test_two_ranks_with_experts_of_one_and_a_half_pages() -> None:
    layout = tensor_layout(balanced(6, 2), expert_bytes=6, page_bytes=4)
    # Expert 3 begins at byte 18, in the middle of the page 16..19, which is rank 0's last one.
    assert layout.segments == (Span(0, 20), Span(20, 16))
    assert layout.nbytes == 36
    assert layout.reserved_bytes == 36
    assert layout.remote_runs[0] == (Span(20, 16),)
    assert remote_bytes_of_experts(layout, 0) == [0, 0, 0, 4, 6, 6]
    assert remote_bytes_of_experts(layout, 1) == [6, 6, 6, 2, 0, 0]


def test_a_rank_whose_experts_fit_in_its_neighbours_page_owns_nothing() -> None:
    layout = tensor_layout(balanced(3, 3), expert_bytes=3, page_bytes=8)
    assert layout.segments == (Span(0, 8), Span(8, 0), Span(8, 8))
    assert layout.remote_runs[1] == (Span(0, 16),)
    assert layout.remote_runs[0] == (Span(8, 8),)


def test_no_bytes() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        tensor_layout(balanced(2, 2), expert_bytes=0, page_bytes=8)


@given(layouts())
def test_segments_tile_the_tensor_in_whole_pages(case: tuple[TensorLayout, int]) -> None:
    layout, group_size = case
    assert len(layout.segments) == group_size
    end = 0
    for segment in layout.segments:
        assert segment.offset == end
        assert segment.nbytes % layout.page_bytes == 0
        end = segment.end
    assert layout.nbytes <= end < layout.nbytes + layout.page_bytes


@given(layouts())
def test_every_page_belongs_to_the_owner_of_an_expert_that_touches_it(case: tuple[TensorLayout, int]) -> None:
    layout, group_size = case
    placement = balanced(layout.num_experts, group_size)
    for rank, segment in enumerate(layout.segments):
        for page in range(segment.offset, segment.end, layout.page_bytes):
            touching = {
                byte // layout.expert_bytes for byte in range(page, min(page + layout.page_bytes, layout.nbytes))
            }
            assert touching & set(placement.shard(rank))


@given(layouts())
def test_remote_runs_are_all_that_is_not_owned(case: tuple[TensorLayout, int]) -> None:
    layout, group_size = case
    for rank in range(group_size):
        runs = layout.remote_runs[rank]
        assert len(runs) <= 2
        seen = bytes_of((*runs, layout.segments[rank], *layout.replicas[rank]))
        assert seen == Counter(range(layout.reserved_bytes))
        assert layout.stored_bytes(rank) == layout.reserved_bytes - sum(run.nbytes for run in runs)


@given(layouts())
def test_blocks_tile_a_segment_and_lie_inside_of_everybodys_replicas_or_outside(
    case: tuple[TensorLayout, int],
) -> None:
    layout, group_size = case
    for rank in range(group_size):
        blocks = layout.blocks[rank]
        assert bytes_of(blocks) == bytes_of([layout.segments[rank]])
        for block in blocks:
            assert block.nbytes % layout.page_bytes == 0
            for runs in layout.replicas:
                assert sum(overlap(block, run).nbytes for run in runs) in (0, block.nbytes)


@given(st.integers(1, 6), st.integers(0, 20), st.integers(1, 200), st.sampled_from([1, 16, 64]), st.data())
def test_local_experts_are_read_locally(
    group_size: int, more: int, expert_bytes: int, page: int, data: st.DataObject
) -> None:
    """All but less than a page at their beginning, which may be the neighbour's last one."""
    num_experts = group_size + more
    wanted = data.draw(st.integers(-(-num_experts // group_size), num_experts))
    placement = balanced(num_experts, group_size)
    layout = tensor_layout(placement, expert_bytes, page, wanted)
    for rank in range(group_size):
        first = placement.boundaries[rank]
        remote = remote_bytes_of_experts(layout, rank)
        kept = [(first + step) % num_experts for step in range(wanted)]
        assert sum(remote[expert] for expert in kept) < page


def test_replicas_wrap_around() -> None:
    layout = tensor_layout(balanced(8, 4), expert_bytes=4, page_bytes=4, local_experts=5)
    assert layout.replicas[0] == (Span(8, 12),)
    assert layout.replicas[3] == (Span(0, 12),)
    assert layout.replicas[2] == (Span(0, 4), Span(24, 8))
    assert layout.blocks[0] == (Span(0, 4), Span(4, 4))
    assert layout.remote_runs[2] == (Span(4, 12),)
    # 3 of 8 experts are remote, and every owner is asked for equally many bytes.
    asked = Counter(piece.owner for rank in range(4) for piece in copy_order({"w": layout}, rank, 4))
    assert asked == {0: 3, 1: 3, 2: 3, 3: 3}


def test_footprint() -> None:
    layers = [{"w": tensor_layout(balanced(8, 2), 4, 4, kept)} for kept in (None, None, 6)]
    assert footprint(layers, 0, 0) == 16 + 16 + 24
    # Slot 0 serves layers 0 and 2, whose remote runs differ in size; slot 1 serves layer 1.
    assert footprint(layers, 0, 2) == 16 + 16 + 24 + (16 + 8) + 16


@given(layouts(), st.integers(1, 100))
def test_every_byte_of_a_staged_view_is_local_or_copied_exactly_once(
    case: tuple[TensorLayout, int], slice_bytes: int
) -> None:
    layout, group_size = case
    for rank in range(group_size):
        order = copy_order({"w": layout}, rank, slice_bytes)
        seen = bytes_of([layout.segments[rank], *layout.replicas[rank]])
        for piece in order:
            owner = layout.segments[piece.owner]
            assert piece.owner != rank
            assert owner.offset <= piece.span.offset < piece.span.end <= owner.end
            assert piece.span.nbytes <= max(1.5 * slice_bytes, slice_bytes + layout.page_bytes)
            seen.update(range(piece.span.offset, piece.span.end))
        assert seen == Counter(range(layout.reserved_bytes))


@given(layouts())
def test_remote_bytes_of_experts_sum_to_what_is_remote(case: tuple[TensorLayout, int]) -> None:
    layout, group_size = case
    for rank in range(group_size):
        tensor = Span(0, layout.nbytes)
        local = sum(overlap(tensor, span).nbytes for span in (layout.segments[rank], *layout.replicas[rank]))
        assert sum(remote_bytes_of_experts(layout, rank)) == layout.nbytes - local


def test_peers_take_turns_and_ranks_start_with_different_ones() -> None:
    layout = tensor_layout(balanced(8, 4), expert_bytes=8, page_bytes=4)
    orders = [[piece.owner for piece in copy_order({"w": layout}, rank, 8)] for rank in range(4)]
    assert orders == [[1, 2, 3, 1, 2, 3], [2, 3, 0, 2, 3, 0], [3, 0, 1, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    # No source is asked by two ranks in the same turn.
    for turn in zip(*orders, strict=True):
        assert len(set(turn)) == 4


def test_several_tensors_are_all_in_the_plan() -> None:
    small = tensor_layout(balanced(6, 3), 4, 4)
    large = tensor_layout(balanced(6, 3), 16, 4)
    order = copy_order({"small": small, "large": large}, 0, 16)
    assert [(p.tensor, p.span) for p in order] == [
        ("small", Span(8, 8)),
        ("small", Span(16, 8)),
        ("large", Span(32, 16)),
        ("large", Span(64, 16)),
        ("large", Span(48, 16)),
        ("large", Span(80, 16)),
    ]


def test_cut_makes_pieces_of_about_one_size() -> None:
    assert list(cut(Span(3, 10), 4, 1)) == [Span(3, 5), Span(8, 5)]
    assert list(cut(Span(8, 33), 8, 4)) == [Span(8, 8), Span(16, 8), Span(24, 8), Span(32, 9)]
    assert list(cut(Span(3, 10), 100, 4)) == [Span(3, 10)]
    assert list(cut(Span(3, 0), 4, 1)) == []


@given(st.integers(0, 10**4), st.integers(100, 10**5), st.integers(1, 500))
def test_pieces_tile_the_span(nbytes: int, slice_bytes: int, unit: int) -> None:
    pieces = list(cut(Span(7, nbytes), slice_bytes, unit))
    assert sum(piece.nbytes for piece in pieces) == nbytes
    assert [piece.offset for piece in pieces] == [7 + sum(p.nbytes for p in pieces[:i]) for i in range(len(pieces))]
    assert all(0 < piece.nbytes <= 1.5 * slice_bytes + unit for piece in pieces)


# DeepSeek-R1 in block-FP8: bytes of one expert's weights.
R1 = {"w13_weight": 2 * 2048 * 7168, "w2_weight": 7168 * 2048}
# Qwen3-30B-A3B in bf16.
QWEN3 = {"w13_weight": 2 * 2 * 768 * 2048, "w2_weight": 2 * 2048 * 768}


def test_a_layer_of_r1_is_copied_in_short_slices_from_several_peers_and_in_long_ones_from_one() -> None:
    layouts = {name: tensor_layout(balanced(256, 8), nbytes, 2 << 20) for name, nbytes in R1.items()}
    order = copy_order(layouts, 3)
    assert {piece.span.nbytes for piece in order} == {SHORT_SLICE_BYTES}
    assert [piece.owner for piece in order[:8]] == [4, 5, 6, 7, 0, 1, 2, 4]
    layouts = {name: tensor_layout(balanced(256, 2), nbytes, 2 << 20) for name, nbytes in R1.items()}
    order = copy_order(layouts, 1)
    assert len(order) == 8
    assert min(piece.span.nbytes for piece in order) > MIN_SLICE_BYTES


def test_slices_are_no_smaller_than_pays() -> None:
    assert slice_bytes_for(1000, 1) == MIN_SLICE_BYTES
    assert slice_bytes_for(100 * MIN_SLICE_BYTES, 1) == 100 * MIN_SLICE_BYTES / 8
    most = MOST_SHORT_SLICES * SHORT_SLICE_BYTES
    assert slice_bytes_for(most, 1) == most / 8
    assert slice_bytes_for(most // 4, 4) == SHORT_SLICE_BYTES
    assert slice_bytes_for(most // 4 + 1, 4) >= MIN_SLICE_BYTES


def test_slices_of_several_peers_are_pages() -> None:
    """A layer of Qwen3-30B-A3B on four ranks: slices of 2 MiB, taken from the three peers in turn."""
    layouts = {name: tensor_layout(balanced(128, 4), nbytes, 2 << 20) for name, nbytes in QWEN3.items()}
    order = copy_order(layouts, 0)
    assert {piece.span.nbytes for piece in order} == {2 << 20}
    assert [piece.owner for piece in order] == [1, 2, 3] * (32 * sum(QWEN3.values()) >> 21)
