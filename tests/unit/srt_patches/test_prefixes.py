"""Which ranks have seen the beginning of a prompt."""

from __future__ import annotations

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.srt_patches.prefixes import PrefixTable, cheapest


def prompt(*parts: tuple[int, int]) -> array[int]:
    """Each part is a token and how often it comes."""
    return array("q", [token for token, count in parts for _ in range(count)])


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=6), st.integers(0, 2)), max_size=20))
def test_hits_are_the_longest_common_beginnings(sent: list[tuple[list[int], int]]) -> None:
    """Prompts of up to six blocks of two kinds, against a comparison with all that was sent."""
    table = PrefixTable(3)
    for kinds, rank in sent:
        table.add(prompt(*((kind, 64) for kind in kinds)), rank)
    wanted = [random.Random(len(sent)).randint(0, 1) for _ in range(6)]
    expected = [0] * 3
    for kinds, rank in sent:
        same = next((i for i, pair in enumerate(zip(kinds, wanted, strict=False)) if pair[0] != pair[1]), None)
        expected[rank] = max(expected[rank], 64 * (len(kinds) if same is None else same))
    assert table.hits(prompt(*((kind, 64) for kind in wanted), (7, 63))) == expected


def test_old_blocks_make_room() -> None:
    table = PrefixTable(1, capacity=4)
    old, used, new = (prompt((token, 128)) for token in range(3))
    for ids in (old, used, used, new):
        table.add(ids, 0)
    assert [table.hits(ids) for ids in (old, used, new)] == [[0], [128], [128]]
    table.add(prompt((9, 64 * 9)), 0)  # longer than all that is kept
    assert table.hits(new) == [0]


def test_the_rank_that_has_least_to_do() -> None:
    assert cheapest([100, 100], [1, 1], [0, 0]) == 0
    assert cheapest([100, 100], [2, 1], [0, 0]) == 1
    assert cheapest([100, 130], [1, 1], [0, 64]) == 1
    assert cheapest([100, 200], [1, 1], [0, 64]) == 0
