"""The simulator: it serves everything, agrees with the closed form, and orders the schemes as it must."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_dwdp.planner.cost import Group, dwdp, layer_fetch_bytes
from sglang_dwdp.planner.formats import FORMATS, default_precision
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.scenario import Scenario
from sglang_dwdp.planner.simulate import simulate
from sglang_dwdp.planner.workload import Lengths, batch_of

SMALL = replace(load_model("qwen3-30b-a3b"), layers=6, name="six layers")
BASE = Scenario(
    model=SMALL,
    gpu=get_gpu("H200"),
    precision=default_precision(FORMATS["bf16"]),
    lengths=Lengths("uniform", 4096, ratio=0.3),
    token_budget=4096,
    requests=40,
)
QUICK = settings(max_examples=25, deadline=None)
scenarios = st.builds(
    replace,
    st.just(BASE),
    mode=st.sampled_from(("dwdp", "dep", "replica")),
    group_size=st.sampled_from((2, 3, 4)),
    groups=st.integers(1, 2),
    copies=st.sampled_from(("serial", "sliced")),
    depth=st.integers(1, 3),
    ring_over_steps=st.booleans(),
    chunked=st.booleans(),
    token_budget=st.sampled_from((512, 4096, 16384)),
    concurrency=st.sampled_from((0, 8)),
    frontend=st.sampled_from((0.0, 0.001)),
    router=st.sampled_from(("round_robin", "least_tokens")),
    seed=st.integers(0, 5),
)


@QUICK
@given(scenarios)
def test_every_request_is_served_and_every_layer_is_fetched(scenario: Scenario) -> None:
    result = simulate(scenario)
    assert len(result.ttft) == scenario.requests
    assert (result.ttft > 0).all()
    assert result.tokens_per_second_per_gpu * result.seconds * scenario.ranks == pytest.approx(result.tokens)
    size = layer_fetch_bytes(scenario.model, scenario.precision, scenario.group)
    expected = result.forwards * scenario.model.moe_layers * size if scenario.mode == "dwdp" else 0
    assert result.pulled == pytest.approx(expected)


@QUICK
@given(scenarios, st.floats(1.2, 8.0))
def test_more_link_bandwidth_never_hurts(scenario: Scenario, factor: float) -> None:
    """Same batches on every rank, so only the copies differ."""
    scenario = replace(scenario, mode="dwdp", concurrency=0, router="round_robin", frontend=0.0)
    gpu = scenario.gpu
    wider = replace(gpu, copy_bandwidth=gpu.copy_bandwidth * factor, pair_bandwidth=gpu.pair_bandwidth * factor)
    assert simulate(replace(scenario, gpu=wider)).seconds <= simulate(scenario).seconds * (1 + 1e-9)


@QUICK
@given(scenarios)
def test_copies_never_make_a_rank_faster_than_a_replica(scenario: Scenario) -> None:
    scenario = replace(scenario, mode="dwdp", concurrency=0, router="round_robin")
    single = simulate(replace(scenario, mode="replica"))
    assert simulate(scenario).seconds >= single.seconds * (1 - 1e-9)


@pytest.mark.parametrize("budget", [1024, 8192, 65536])
def test_steady_state_is_the_closed_form(budget: int) -> None:
    """Copies bound, near the balance, and hidden: full equal forwards."""
    scenario = replace(BASE, lengths=Lengths("fixed", budget), token_budget=budget, requests=4 * 40, group_size=4)
    expected = dwdp(scenario.model, scenario.gpu, scenario.precision, batch_of([(budget, 0)]), Group(4)).seconds
    assert simulate(scenario).seconds / 40 == pytest.approx(expected)


def test_whole_peer_copies_lose_to_slices_when_copies_bound() -> None:
    scenario = replace(BASE, lengths=Lengths("uniform", 4096, ratio=0.5), group_size=4, requests=80)
    sliced, serial = simulate(scenario), simulate(replace(scenario, copies="serial"))
    assert serial.seconds > sliced.seconds * 1.05
    assert serial.exposed > sliced.exposed


def test_ranks_of_a_dep_group_wait_for_the_slowest() -> None:
    even = simulate(replace(BASE, mode="dep", lengths=Lengths("fixed", 4096)))
    uneven = simulate(replace(BASE, mode="dep", chunked=False))
    assert uneven.waited / uneven.seconds > even.waited / even.seconds > 0  # hot experts are left


def test_a_frontend_spreads_arrivals_at_the_ranks() -> None:
    """A request that is not there yet cannot join a forward: the first forward has one prompt."""
    base = replace(BASE, mode="replica", group_size=1, requests=3, lengths=Lengths("fixed", 100))
    together, spread = simulate(base), simulate(replace(base, frontend=0.0001))
    assert together.forwards == 1
    assert spread.forwards == 2


def test_no_prompt_joins_a_forward_that_has_its_tokens() -> None:
    base = replace(BASE, mode="replica", group_size=1, requests=4, lengths=Lengths("fixed", 1000))
    assert simulate(base).forwards == 1
    assert simulate(replace(base, max_prefill_tokens=1500)).forwards == 2


def test_a_simulation_repeats_itself() -> None:
    first, second = simulate(BASE), simulate(BASE)
    assert np.array_equal(first.ttft, second.ttft)
    assert not np.array_equal(first.ttft, simulate(replace(BASE, seed=1)).ttft)


def test_open_loop_queues_grow_with_the_rate() -> None:
    assert simulate(replace(BASE, rate=1.0)).percentile(50) < simulate(replace(BASE, rate=2000.0)).percentile(50)
