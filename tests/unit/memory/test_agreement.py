"""Lines that differ between ranks are named; equal ones cost a hash."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.memory.agreement import check_same
from sglang_dwdp.memory.handshake import Exchange

LINES = st.lists(st.text(st.characters(blacklist_characters="\n", blacklist_categories=["Cs"])), max_size=4)


def on_ranks(lines: list[list[str]]) -> list[Any]:
    name = uuid.uuid4().hex

    def one(rank: int) -> Any:
        exchange = Exchange(name, rank, len(lines), 10.0)
        try:
            exchange.connect()
            return check_same(exchange, lines[rank], "was started with other options")
        except Exception as error:  # noqa: BLE001  (it is the result)
            return error
        finally:
            exchange.close()

    with ThreadPoolExecutor(len(lines)) as pool:
        return list(pool.map(one, range(len(lines))))


def test_every_rank_names_a_rank_that_differs_and_how() -> None:
    same = [f"--option {number}" for number in range(9)]
    results = on_ranks([same, ["--option x", *same[1:]], same])
    assert "rank 1 was started with other options: here --option 0, there --option x" in str(results[0])
    assert "rank 0 was started with other options: here --option x, there --option 0" in str(results[1])
    assert "rank 1 " in str(results[2])
    first, second = on_ranks([same, same[:2]])
    assert "here --option 2, there nothing; " in str(first)
    assert str(first).endswith("and 3 more")
    assert "here nothing, there --option 2" in str(second)


@settings(max_examples=30, deadline=None)
@given(LINES, LINES)
def test_only_equal_lines_pass(one: list[str], other: list[str]) -> None:
    results = on_ranks([one, other])
    if "\n".join(one) == "\n".join(other):
        assert results == [None, None]
    else:
        assert all(isinstance(result, DwdpSetupError) for result in results)
