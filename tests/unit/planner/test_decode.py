"""Decode steps: against what two H100 took, and the limits of the formula."""

from dataclasses import replace

import pytest

from sglang_dwdp.planner.cost import Group
from sglang_dwdp.planner.decode import Step, decode_step, pays_from
from sglang_dwdp.planner.formats import default_precision, get_format
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.models import load_model

MODEL = replace(load_model("qwen3-30b-a3b"), layers=12, vocab=2048)  # as measured


def step(sequences: int, group: Group, context: float = 256) -> Step:
    return decode_step(MODEL, get_gpu("H100"), default_precision(get_format("bf16")), group, sequences, context)


@pytest.mark.parametrize(
    ("sequences", "together", "replica"), [(8, 5697, 5772), (32, 17_114, 12_094), (64, 32_457, 21_378)]
)
def test_two_h100(sequences: int, together: float, replica: float) -> None:
    """Tokens per second of both ranks in docs/performance.md, to which nothing is fitted."""
    planned = step(sequences, Group(2))
    assert 2 * sequences / planned.together == pytest.approx(together, rel=0.12)
    assert 2 * sequences / planned.replica == pytest.approx(replica, rel=0.2)


@pytest.mark.parametrize(("sequences", "alone"), [(8, 1551), (32, 2974)])
def test_two_h100_alone(sequences: int, alone: float) -> None:
    """The same without exchange steps, from an earlier run."""
    assert 2 * sequences / step(sequences, Group(2)).alone == pytest.approx(alone, rel=0.1)


def test_where_all_experts_are_stored_a_rank_is_a_replica() -> None:
    planned = step(8, Group(2, local_experts=128))
    assert planned.alone == planned.replica


def test_larger_groups_read_less_of_their_own_experts() -> None:
    small, large = step(32, Group(2)), step(32, Group(8))
    assert large.alone > small.alone
    assert large.together < small.together


def test_a_longer_cache_costs_all_alike() -> None:
    short, long = step(32, Group(2)), step(32, Group(2), context=8192)
    assert long.alone - short.alone == pytest.approx(long.together - short.together)
    assert long.alone > short.alone


def test_where_it_pays() -> None:
    steps = [Step(1, 1.0, 2.0, 1.0), Step(8, 4.0, 3.0, 1.0), Step(32, 9.0, 4.0, 1.0)]
    assert pays_from(steps) == 8
    assert pays_from(steps[:1]) is None
