"""How many experts fit: against trying all numbers, and in time for large groups."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.budget import GIB, choose_local_experts, largest_footprint
from sglang_dwdp.experts.placement import balanced, min_local_experts


@given(
    num_experts=st.integers(4, 24),
    group_size=st.integers(2, 4),
    num_layers=st.integers(1, 6),
    expert_bytes=st.integers(1, 200),
    depth=st.integers(1, 4),
    share=st.floats(0, 1.2),
)
def test_the_most_experts_that_fit_are_kept(
    num_experts: int, group_size: int, num_layers: int, expert_bytes: int, depth: int, share: float
) -> None:
    layers = [(balanced(num_experts, group_size), {"w": expert_bytes})] * num_layers
    least, page_bytes = min_local_experts(num_experts, group_size), 64
    needed = {kept: largest_footprint(layers, page_bytes, kept, depth) for kept in range(least, num_experts + 1)}
    budget = int(needed[num_experts] * share) + 1
    config = DwdpConfig(memory_gib=budget / GIB, depth=depth)
    fitting = [kept for kept, nbytes in needed.items() if nbytes <= budget]
    if fitting:
        assert choose_local_experts(config, layers, page_bytes) == max(fitting)
    else:
        with pytest.raises(DwdpConfigError, match=f"{least} experts of each layer"):
            choose_local_experts(config, layers, page_bytes)


def test_what_was_asked_for() -> None:
    layers = [(balanced(8, 2), {"w": 10})]
    assert choose_local_experts(DwdpConfig(), layers, 64) is None
    assert choose_local_experts(DwdpConfig(local_experts=6), layers, 64) == 6
    with pytest.raises(DwdpConfigError, match="--dwdp-local-experts 3"):
        choose_local_experts(DwdpConfig(local_experts=3), layers, 64)


def test_a_group_of_72_ranks_is_quick() -> None:
    """58 layers of DeepSeek-R1 in block-FP8; a rank has 100 GiB for experts."""
    layers = [(balanced(256, 72), {"w13_weight": 2 * 2048 * 7168, "w2_weight": 7168 * 2048})] * 58
    start = time.process_time()
    kept = choose_local_experts(DwdpConfig(memory_gib=100), layers, 2 << 20)
    assert kept is not None
    assert 4 < kept < 256
    assert time.process_time() - start < 1
