"""The simulator: it agrees with the closed form, conserves bytes, and is fast enough."""

import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simpy.events import Event

from sglang_dwdp.planner.cost import Group, dwdp, layer_fetch_bytes
from sglang_dwdp.planner.fabric import Port
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
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
scenarios = st.builds(
    replace,
    st.just(BASE),
    group_size=st.sampled_from((2, 3, 4)),
    groups=st.integers(1, 2),
    copies=st.sampled_from(("serial", "sliced")),
    order=st.sampled_from(("rotation", "random")),
    depth=st.integers(1, 3),
    ring_over_steps=st.booleans(),
    chunked=st.booleans(),
    token_budget=st.sampled_from((512, 4096, 16384)),
    concurrency=st.sampled_from((0, 8)),
    router=st.sampled_from(("round_robin", "least_tokens")),
    jitter=st.sampled_from((0.0, 0.1)),
    seed=st.integers(0, 5),
)


@QUICK
@given(scenarios)
def test_every_request_is_served_and_bytes_are_conserved(scenario: Scenario) -> None:
    result = simulate(scenario)
    assert len(result.ttft) == scenario.requests
    assert (result.ttft > 0).all()
    size = layer_fetch_bytes(scenario.model, scenario.precision, scenario.group)
    for pulled in result.pulled:
        assert pulled / size == pytest.approx(round(pulled / size))  # whole layers only
    # what was read is what was sent out, but for pulls still under way at the end
    under_way = scenario.ranks * size
    assert sum(result.pulled) - 1 <= sum(result.served) <= sum(result.pulled) + under_way
    layers = result.forwards * scenario.model.moe_layers
    ahead = scenario.ranks * scenario.depth
    unfinished = scenario.ranks * scenario.model.moe_layers
    assert layers - unfinished <= sum(result.pulled) / size <= layers + ahead


def _faster(scenario: Scenario, factor: float) -> Scenario:
    gpu = scenario.gpu
    wider = replace(gpu, copy_bandwidth=gpu.copy_bandwidth * factor, pair_bandwidth=gpu.pair_bandwidth * factor)
    return replace(scenario, gpu=wider)


@QUICK
@given(scenarios, st.floats(1.2, 8.0))
def test_more_link_bandwidth_never_hurts_sliced_copies(scenario: Scenario, factor: float) -> None:
    """Same batches on every rank, so only the copies differ."""
    scenario = replace(scenario, copies="sliced", concurrency=0, router="round_robin")
    assert simulate(_faster(scenario, factor)).seconds <= simulate(scenario).seconds * (1 + 1e-9)


@pytest.mark.parametrize("order", ["rotation", "random"])
@pytest.mark.parametrize("factor", [1.3, 2.0, 5.0])
def test_more_link_bandwidth_does_not_hurt_whole_peer_copies_on_average(order: str, factor: float) -> None:
    """One run can lose a few percent: faster copies meet at other sources. Ten runs together do not."""
    base = replace(BASE, copies="serial", order=order, group_size=4, requests=80)
    runs = [replace(base, seed=seed) for seed in range(10)]
    slow = sum(simulate(run).seconds for run in runs)
    assert sum(simulate(_faster(run, factor)).seconds for run in runs) <= slow


@QUICK
@given(scenarios)
def test_lockstep_never_beats_independent_ranks(scenario: Scenario) -> None:
    alone = replace(scenario, mode="replica", concurrency=0, jitter=0.0, router="round_robin")
    together = replace(alone, lockstep=True)
    assert simulate(together).seconds >= simulate(alone).seconds * (1 - 1e-9)


@QUICK
@given(scenarios)
def test_copies_never_make_a_rank_faster_than_a_replica(scenario: Scenario) -> None:
    scenario = replace(scenario, concurrency=0, router="round_robin")
    whole = simulate(replace(scenario, mode="replica"))
    assert simulate(scenario).seconds >= whole.seconds * (1 - 1e-9)


@pytest.mark.parametrize("budget", [1024, 8192, 65536])
def test_steady_state_agrees_with_the_closed_form(budget: int) -> None:
    """Copies bound, near the balance, and hidden: full equal forwards, sliced copies."""
    scenario = replace(BASE, lengths=Lengths("fixed", budget), token_budget=budget, requests=4 * 40, group_size=4)
    result = simulate(scenario)
    batch = batch_of([(budget, 0)])
    expected = dwdp(scenario.model, scenario.gpu, scenario.precision, batch, Group(4)).seconds
    assert result.seconds / 40 == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("budget", [4096, 12288, 65536])
def test_the_closed_form_knows_what_slots_are_worth(depth: int, budget: int) -> None:
    """Three dense layers, copies near the balance: with one slot they hide under attention only."""
    model = replace(load_model("deepseek-r1"), layers=13, dense_layers=3)
    precision = default_precision(FORMATS["nvfp4"])
    scenario = replace(
        BASE,
        model=model,
        gpu=get_gpu("GB200"),
        precision=precision,
        lengths=Lengths("fixed", budget),
        token_budget=budget,
        group_size=4,
        depth=depth,
        requests=4 * 40,
    )
    expected = dwdp(model, scenario.gpu, precision, batch_of([(budget, 0)]), Group(4, depth=depth)).seconds
    assert simulate(scenario).seconds / 40 == pytest.approx(expected, rel=0.04)


def test_serial_random_copies_lose_to_slices_when_copies_bound() -> None:
    model = replace(load_model("deepseek-r1"), layers=13, dense_layers=3)
    scenario = replace(
        BASE,
        model=model,
        gpu=get_gpu("GB200"),
        precision=default_precision(FORMATS["nvfp4"]),
        lengths=Lengths("uniform", 4096, ratio=0.5),
        group_size=4,
        requests=80,
    )
    sliced = simulate(scenario)
    serial = simulate(replace(scenario, copies="serial", order="random"))
    assert serial.seconds > sliced.seconds * 1.05
    assert sum(serial.exposed) > sum(sliced.exposed)


def test_ranks_of_a_mesh_do_not_share_sources() -> None:
    """Without a switch every pair has its wire: serial pulls run at the pair's rate, unslowed."""
    gpu = replace(get_gpu("MI355X"))
    model = replace(SMALL, layers=3)
    scenario = replace(BASE, model=model, gpu=gpu, lengths=Lengths("fixed", 64), copies="serial", requests=8)
    result = simulate(scenario)
    size = layer_fetch_bytes(model, scenario.precision, scenario.group)
    fetched = round(result.pulled[0] / size)
    assert result.copying[0] == pytest.approx(fetched * size / gpu.pair_bandwidth)


def test_a_port_is_shared_equally() -> None:
    env = simpy.Environment()
    port = Port(env, 100.0)
    ends: dict[str, float] = {}

    def reader(name: str, start: float, size: float) -> Generator[Event, Any, None]:
        yield env.timeout(start)
        yield port.pull(size)
        ends[name] = env.now

    env.process(reader("a", 0.0, 100.0))
    env.process(reader("b", 0.5, 100.0))
    env.run()
    # alone for 0.5 s (50 bytes), then half the rate each: a ends at 1.5, b has 50 left, alone again
    assert ends["a"] == pytest.approx(1.5)
    assert ends["b"] == pytest.approx(2.0)
    assert port.served == 200
    assert port.busy == pytest.approx(2.0)


def test_a_simulation_repeats_itself() -> None:
    scenario = replace(BASE, jitter=0.1, order="random", copies="serial")
    first, second = simulate(scenario), simulate(scenario)
    assert np.array_equal(first.ttft, second.ttft)
    other = simulate(replace(scenario, seed=1))
    assert not np.array_equal(first.ttft, other.ttft)


def test_open_loop_queues_grow_with_the_rate() -> None:
    light = simulate(replace(BASE, rate=1.0))
    heavy = simulate(replace(BASE, rate=2000.0))
    assert light.percentile(50) < heavy.percentile(50)


def test_jitter_costs_lockstep_more_than_independent_ranks() -> None:
    base = replace(BASE, mode="replica", lengths=Lengths("fixed", 4096), requests=80)
    calm = simulate(base).seconds
    alone = simulate(replace(base, jitter=0.2)).seconds / calm
    together = simulate(replace(base, jitter=0.2, lockstep=True)).seconds / calm
    assert together > 1.1
    assert alone < together


def test_a_throttled_gpu_is_slower_by_its_factor() -> None:
    base = replace(BASE, mode="replica")
    assert simulate(replace(base, slowdown=1.25)).seconds == pytest.approx(1.25 * simulate(base).seconds)


def test_ten_thousand_requests_on_64_ranks_take_under_a_minute() -> None:
    scenario = Scenario(
        model=load_model("deepseek-r1"),
        gpu=get_gpu("GB200"),
        precision=default_precision(FORMATS["nvfp4"]),
        lengths=Lengths("uniform", 8192, ratio=0.8),
        group_size=4,
        groups=16,
        copies="serial",
        requests=10_000,
        concurrency=4096,
    )
    start = time.perf_counter()
    result = simulate(scenario)
    assert time.perf_counter() - start < 60
    assert len(result.ttft) == 10_000
