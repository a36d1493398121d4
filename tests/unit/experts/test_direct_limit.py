"""The limit of direct views: the formula, against what it is derived from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.config import DEFAULT_DIRECT_MAX_TOKENS
from sglang_dwdp.experts.direct_limit import IN_PLACE_OVER_COPY, direct_limit


@pytest.mark.parametrize(
    ("num_experts", "experts_per_token", "tokens"),
    [(256, 8, 64), (128, 8, 31), (384, 8, 96), (32, 4, 15), (16, 1, 31), (8, 2, 7)],
)
def test_models(num_experts: int, experts_per_token: int, tokens: int) -> None:
    assert direct_limit(num_experts, experts_per_token) == tokens


@given(st.integers(2, 1024).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e - 1))))
def test_up_to_the_limit_reading_in_place_is_no_slower_than_copying_all(model: tuple[int, int]) -> None:
    num_experts, experts_per_token = model

    def in_place(tokens: int) -> float:
        """Seconds, where copying all experts takes 1."""
        return (1 - (1 - experts_per_token / num_experts) ** tokens) / IN_PLACE_OVER_COPY

    limit = direct_limit(num_experts, experts_per_token)
    assert in_place(limit) <= 1 + 1e-9
    assert in_place(limit + 1) > 1 - 1e-9


def test_tokens_that_choose_all_experts_never_read_in_place() -> None:
    assert direct_limit(8, 8) == 0


def test_a_model_that_does_not_say_how_many_experts_a_token_chooses() -> None:
    assert direct_limit(64, None) == DEFAULT_DIRECT_MAX_TOKENS
