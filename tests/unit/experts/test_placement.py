import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.placement import Placement, balanced, check_local_experts, min_local_experts

groups = st.tuples(st.integers(1, 600), st.integers(1, 16)).filter(lambda pair: pair[0] >= pair[1])


@given(groups)
def test_every_expert_has_one_owner_and_shares_differ_by_at_most_one(group: tuple[int, int]) -> None:
    num_experts, group_size = group
    placement = balanced(num_experts, group_size)
    assert [e for rank in range(group_size) for e in placement.shard(rank)] == list(range(num_experts))
    sizes = [len(placement.shard(rank)) for rank in range(group_size)]
    assert max(sizes) - min(sizes) <= 1
    for rank in range(group_size):
        for index, expert in enumerate(placement.shard(rank)):
            assert placement.owner(expert) == rank
            assert placement.local_index(rank, expert) == index


def test_local_index_of_a_remote_expert_is_minus_one() -> None:
    placement = balanced(10, 3)
    assert [placement.local_index(1, expert) for expert in range(10)] == [-1, -1, -1, 0, 1, 2, -1, -1, -1, -1]


def test_owner_of_no_expert() -> None:
    with pytest.raises(IndexError, match="expert 10 is not one of 10"):
        balanced(10, 3).owner(10)


def test_fewer_experts_than_ranks() -> None:
    with pytest.raises(DwdpConfigError, match=r"2 experts cannot be shared among 3 ranks.*--tp-size, to 2"):
        balanced(2, 3)


@pytest.mark.parametrize("boundaries", [(), (0,), (1, 2), (0, 2, 2), (0, 3, 2)])
def test_boundaries_must_rise(boundaries: tuple[int, ...]) -> None:
    with pytest.raises(DwdpConfigError, match="boundaries"):
        Placement(boundaries)


@given(groups)
def test_the_fewest_local_experts_are_the_largest_shard(group: tuple[int, int]) -> None:
    placement = balanced(*group)
    assert min_local_experts(*group) == max(len(placement.shard(rank)) for rank in range(placement.group_size))


def test_local_experts_are_checked_against_the_group() -> None:
    for wanted in (None, 5, 9):
        check_local_experts(wanted, 9, 2)
    for wanted in (4, 10):
        with pytest.raises(DwdpConfigError, match=rf"--dwdp-local-experts {wanted}: .* from 5 to 9"):
            check_local_experts(wanted, 9, 2)
