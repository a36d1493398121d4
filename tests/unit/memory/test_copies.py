"""Copies that continue one another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.memory.copies import Copy, joined


def test_slices_that_peers_take_in_turn_become_long_ones() -> None:
    turns = [(peer * 1000 + at, peer * 9000 + at, 4) for at in range(0, 20, 4) for peer in (1, 2)]
    assert joined(turns, 12) == [(1000, 9000, 12), (2000, 18000, 12), (1012, 9012, 8), (2012, 18012, 8)]
    assert joined(turns, 3) == turns


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 40), st.data())
def test_the_same_bytes_are_copied(sizes: list[int], longest: int, data: st.DataObject) -> None:
    copies: list[Copy] = []
    for size in sizes:
        start = sum(nbytes for *_, nbytes in copies)
        gap = data.draw(st.sampled_from([0, 0, 1000]))  # a source that does not continue the one before
        copies.append((start, 5000 + start + gap * len(copies), size))
    order = data.draw(st.permutations(copies))
    result = joined(order, longest)

    def moved(parts: list[Copy]) -> dict[int, int]:
        return {to + byte: source + byte for to, source, nbytes in parts for byte in range(nbytes)}

    assert moved(result) == moved(copies)
    assert sum(nbytes for *_, nbytes in result) == sum(sizes)
    assert all(part in copies or part[2] <= longest for part in result)
