"""Contention: the paper's Table 2 to 0.1 point, counted and computed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.planner.contention import (
    contention_probabilities,
    serial_slowdown,
    simulated_contention,
)
from sglang_dwdp.planner.errors import PlannerError

TABLE_2 = {
    3: (50.0, 50.0),
    4: (44.44, 44.44, 11.11),
    6: (40.96, 40.96, 15.36, 2.56, 0.16),
    8: (39.66, 39.66, 16.52, 3.67, 0.46, 0.03),
    16: (38.06, 38.06, 17.67, 5.05, 0.99, 0.14),
}


@pytest.mark.parametrize("size", TABLE_2)
def test_table_2_analytic_and_simulated(size: int) -> None:
    exact = contention_probabilities(size)
    counted = simulated_contention(size, rounds=400_000)
    for theirs, analytic, simulated in zip(TABLE_2[size], exact, counted, strict=False):
        assert 100 * analytic == pytest.approx(theirs, abs=0.01)
        assert 100 * simulated == pytest.approx(theirs, abs=0.2)


@given(st.integers(2, 72))
def test_probabilities_sum_to_one_and_average_as_expected(size: int) -> None:
    chances = contention_probabilities(size)
    assert sum(chances) == pytest.approx(1)
    mean = sum(c * p for c, p in enumerate(chances, start=1))
    assert mean == pytest.approx(1 + (size - 2) / (size - 1))


@given(st.integers(2, 32), st.floats(0.01, 10), st.floats(0.01, 10))
def test_slowdown_lies_between_none_and_a_saturated_source(size: int, alone: float, window: float) -> None:
    factor = serial_slowdown(size, alone, window)
    assert 1 <= factor <= 1 + (size - 2) / (size - 1) + 1e-9
    assert serial_slowdown(size, alone, window * 2) <= factor + 1e-9


def test_two_ranks_never_meet_at_a_source() -> None:
    assert serial_slowdown(2, 1.0, 1.0) == 1


def test_one_rank_is_refused() -> None:
    with pytest.raises(PlannerError, match="at least 2"):
        contention_probabilities(1)
