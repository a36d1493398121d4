"""Lengths and packing: nothing is lost, budgets hold."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.workload import Lengths, batch_of, causal_pairs, pack, typical_rounds, windowed_pairs

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 6000), st.booleans())
def test_packing_keeps_every_token_and_the_budget(lengths: list[int], budget: int, chunked: bool) -> None:
    batches = pack(lengths, budget, chunked)
    assert sum(b.tokens for b in batches) == sum(lengths)
    if chunked:
        assert all(b.tokens <= budget for b in batches)
        assert all(b.tokens == budget for b in batches[:-1])
    else:
        assert all(b.tokens <= max(budget, *lengths) for b in batches)


@given(LENGTHS, st.integers(1, 6000))
def test_chunks_attend_to_as_many_pairs_as_whole_prompts(lengths: list[int], budget: int) -> None:
    chunks = sum(b.pairs for b in pack(lengths, budget, True))
    assert chunks == pytest.approx(sum(causal_pairs(n) for n in lengths))


@given(st.integers(1, 400), st.integers(0, 400), st.integers(1, 200))
def test_windowed_pairs_count_key_by_key(new: int, prefix: int, window: int) -> None:
    by_hand = sum(min(prefix + i + 1, window) for i in range(new))
    assert windowed_pairs(new, prefix, window) == by_hand


def test_distributions_have_the_moments_asked_for() -> None:
    rng = np.random.default_rng(0)
    uniform = Lengths("uniform", 8192, ratio=0.5).sample(20_000, rng)
    assert uniform.min() >= 4096
    assert uniform.max() <= 8192
    assert uniform.mean() == pytest.approx(6144, rel=0.01)
    lognormal = Lengths("lognormal", 6000, std=3000).sample(50_000, rng)
    assert lognormal.mean() == pytest.approx(6000, rel=0.02)
    assert lognormal.std() == pytest.approx(3000, rel=0.05)
    normal = Lengths("normal", 16384, std=4096, limit=16384).sample(1000, rng)
    assert normal.max() == 16384


def test_typical_rounds_are_full_and_repeatable() -> None:
    lengths = Lengths("uniform", 1024, ratio=0.8)
    rounds = typical_rounds(lengths, 4096, True, 3, rounds=20)
    assert len(rounds) == 20
    assert all(len(ranks) == 3 for ranks in rounds)
    assert all(b.tokens == 4096 for ranks in rounds for b in ranks)
    typical_rounds.cache_clear()
    assert rounds == typical_rounds(lengths, 4096, True, 3, rounds=20)


def test_prompts_of_many_chunks_are_seen_to_their_end() -> None:
    """Chunks late in a long prompt attend to all that precedes them: half of its length on average."""
    rounds = typical_rounds(Lengths("fixed", 131072), 512, True, 2, rounds=64)
    batches = [b for ranks in rounds for b in ranks]
    assert len(batches) == 128
    assert all(b.tokens == 512 for b in batches)
    assert sum(b.pairs / b.tokens for b in batches) / 128 == pytest.approx(65536, rel=0.05)


def test_batch_of_counts_the_window() -> None:
    batch = batch_of([(10, 0), (4, 6)], window=4)
    assert batch.tokens == 14
    assert batch.pairs == 55 + 34
    assert batch.window_pairs == 10 + 6 * 4 + 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "zipf"}, "kind: .*lognormal.*, not 'zipf'"),
        ({"length": 0}, "length: .* equal to 1"),
        ({"ratio": 1.5}, "ratio: .* equal to 1"),
        ({"std": -1.0}, "std: .* equal to 0"),
        ({"std": float("inf")}, "std: .* 10000000"),
        ({"std": float("nan")}, "std: "),
        ({"length": 10**11}, "length: .* 10000000"),
        ({"length": "8k"}, "length: .* integer, not '8k'"),
        ({"limit": -1}, "limit: .* equal to 0"),
        ({"mean": 1}, "mean: "),
    ],
)
def test_bad_lengths_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlannerError, match=message):
        Lengths(**settings)
