"""The cost model: calibration, the roofline table, and what must hold for any input."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.planner import kernels
from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.cost import (
    Group,
    dwdp,
    equal_share,
    forward_parts,
    in_tree_group,
    layer_fetch_bytes,
    pull_bandwidth,
    replica,
    serial_slowdown,
)
from sglang_dwdp.planner.dep import (
    dep,
    dep_forward,
    exchange_bytes,
    exchange_seconds,
    expert_wait,
    gathered_seconds,
    length_wait,
)
from sglang_dwdp.planner.formats import FORMATS, default_precision, get_format
from sglang_dwdp.planner.gpus import GPUS, Gpu, get_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.workload import Batch, batch_of, mean_batch

NAMES = ("deepseek-r1", "qwen3-30b-a3b", "gpt-oss-120b", "mixtral-8x7b", "glm-4.5")
models = st.sampled_from([load_model(name) for name in NAMES])
gpus = st.sampled_from(list(GPUS.values()))
groups = st.builds(
    Group,
    size=st.integers(2, 8),
    copies=st.sampled_from(("serial", "sliced")),
    depth=st.integers(1, 4),
    ring_over_steps=st.booleans(),
)
lengths = st.lists(st.integers(1, 20_000), min_size=1, max_size=6)
BF16 = default_precision(FORMATS["bf16"])
FP4 = default_precision(FORMATS["nvfp4"])


def _batch(items: list[int], window: int = 0) -> Batch:
    return batch_of([(n, 0) for n in items], window)


@given(models, gpus, groups, lengths, st.floats(1.0, 8.0))
def test_more_link_bandwidth_never_hurts(
    model: ModelShape, gpu: Gpu, group: Group, items: list[int], factor: float
) -> None:
    faster = replace(
        gpu,
        link_bandwidth=gpu.link_bandwidth * factor,
        copy_bandwidth=gpu.copy_bandwidth * factor,
        pair_bandwidth=gpu.pair_bandwidth * factor,
    )
    batch = _batch(items, model.window)
    before = dwdp(model, gpu, BF16, batch, group).seconds
    assert dwdp(model, faster, BF16, batch, group).seconds <= before * (1 + 1e-9)
    ranks = [[batch] * group.size]
    assert dep(model, faster, BF16, ranks).seconds <= dep(model, gpu, BF16, ranks).seconds * (1 + 1e-9)


@given(models, gpus, groups, lengths)
def test_dwdp_takes_at_least_compute_and_at_least_fetch(
    model: ModelShape, gpu: Gpu, group: Group, items: list[int]
) -> None:
    estimate = dwdp(model, gpu, BF16, _batch(items, model.window), group)
    assert estimate.seconds >= estimate.compute * (1 - 1e-9)
    assert estimate.seconds >= estimate.fetch * (1 - 1e-9)
    assert estimate.seconds == pytest.approx(estimate.compute + estimate.parts.exposed_copy)


@given(models, gpus, lengths, st.integers(1, 500))
def test_a_larger_batch_takes_longer(model: ModelShape, gpu: Gpu, items: list[int], extra: int) -> None:
    small, large = _batch(items, model.window), _batch([*items, extra], model.window)
    assert replica(model, gpu, BF16, small).seconds <= replica(model, gpu, BF16, large).seconds


@given(models, gpus, st.integers(2, 8), lengths)
def test_dep_with_uneven_ranks_is_no_faster_than_with_even_ones(
    model: ModelShape, gpu: Gpu, ranks: int, items: list[int]
) -> None:
    even = _batch(items, model.window)
    double = Batch(2 * even.tokens, 2 * even.pairs, 2 * even.window_pairs)
    nothing = Batch(0.0, 0.0)
    level = dep(model, gpu, BF16, [[even] * (2 * (ranks // 2))])
    uneven = dep(model, gpu, BF16, [[double, nothing] * (ranks // 2)])
    assert uneven.tokens == pytest.approx(level.tokens)
    assert uneven.seconds >= level.seconds * (1 - 1e-9)


@given(models, st.integers(2, 8), st.integers(0, 64))
def test_bytes_are_conserved(model: ModelShape, size: int, extra: int) -> None:
    """What a rank stores and what it fetches make up one layer, per layer and expert."""
    share = -(-model.experts // size)
    group = Group(size, local_experts=min(model.experts, share + extra))
    one = model.expert_params * BF16.experts.bytes_per_param
    assert layer_fetch_bytes(model, BF16, group) + group.stored(model) * one == model.experts * one
    batch = _batch([1024], model.window)
    fetched = dwdp(model, get_gpu("H100"), BF16, batch, group).fetch_bytes
    assert fetched == pytest.approx(layer_fetch_bytes(model, BF16, group) * model.moe_layers)


@given(st.floats(0, 1e5), st.integers(1, 512))
def test_distinct_experts_are_bounded(rows: float, experts: int) -> None:
    count = kernels.distinct_experts(experts, rows)
    assert 0 <= count <= experts + 1e-9
    assert count <= max(rows, 1.0) + 1e-9


@given(models, gpus, st.integers(1, 6), st.integers(2, 6), st.data())
def test_lockstep_never_beats_independent_ranks(
    model: ModelShape, gpu: Gpu, rounds: int, ranks: int, data: st.DataObject
) -> None:
    """Waiting for each other in every forward takes at least as long as the busiest rank needs alone for all of its."""
    sizes = st.lists(st.lists(lengths, min_size=ranks, max_size=ranks), min_size=rounds, max_size=rounds)
    drawn = [[_batch(items, model.window) for items in row] for row in data.draw(sizes)]
    mean = mean_batch(drawn)
    base = forward_parts(model, gpu, BF16, mean)
    together = length_wait(base, mean, drawn)
    for rank in range(ranks):
        assert together >= length_wait(base, mean, [[row[rank]] for row in drawn]) - 1e-9 * base.total


def test_every_constant_has_a_source() -> None:
    for gpu in GPUS.values():
        plain = {f.name for f in fields(Gpu)} - {"name", "sources", "gathered_rows"}
        assert plain <= set(gpu.sources), gpu.name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100 sxm", "H100"),
        ("GB200 NVL72", "GB200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("AMD Instinct MI355X", "MI355X"),
    ],
)
def test_gpus_by_the_names_in_use(name: str, expected: str) -> None:
    assert get_gpu(name).name == expected


def test_redundant_experts_reduce_the_fetch() -> None:
    model, gpu = load_model("deepseek-r1"), get_gpu("GB200")
    batch = _batch([4096])
    plain = dwdp(model, gpu, FP4, batch, Group(3))
    more = dwdp(model, gpu, FP4, batch, Group(3, local_experts=128))
    assert more.fetch_bytes < plain.fetch_bytes
    assert more.seconds < plain.seconds


def test_in_tree_style_is_never_faster() -> None:
    model, gpu = load_model("gpt-oss-120b"), get_gpu("H200")
    precision = default_precision(FORMATS["mxfp4"])
    for tokens in (512, 2048, 4096, 8192, 32768):
        batch = _batch([tokens], model.window)
        sliced = dwdp(model, gpu, precision, batch, Group(4)).seconds
        in_tree = dwdp(model, gpu, precision, batch, in_tree_group(4)).seconds
        assert sliced <= in_tree * (1 + 1e-9)


def test_hot_experts_cost_more_the_fewer_experts_a_rank_has() -> None:
    gpu = get_gpu("H200")
    for name in NAMES:
        model = load_model(name)
        shares = [expert_wait(model, gpu, ranks, 1.0) for ranks in (1, 2, 4, 8)]
        assert shares[0] == 0
        assert shares == sorted(shares)
        # a rank cannot be given more than all copies of every token
        assert shares[-1] <= 7
        assert expert_wait(model, replace(gpu, expert_skew=0.0), 8, 1.0) == 0


def test_exchange_bytes_by_hand() -> None:
    model = load_model("deepseek-r1")
    precision = replace(BF16, dispatch_bytes=0.5625)
    copies = 3 * (1 - 0.75**8)
    assert exchange_bytes(model, precision, 10, 4, "all-to-all") == pytest.approx(10 * copies * 7168 * 2.5625)
    assert exchange_bytes(model, precision, 10, 4, "all-gather") == 10 * 3 * 7168 * 4


def test_four_bit_weights_run_at_the_bf16_rate_on_hopper() -> None:
    hopper = get_gpu("H100")
    assert hopper.peak(get_format("mxfp4")) == hopper.peak_flops["bf16"]
    assert get_gpu("B200").peak(get_format("mxfp4")) == get_gpu("B200").peak_flops["fp4"]


def test_attention_of_windowed_layers_is_cheaper() -> None:
    model = load_model("gpt-oss-20b")
    batch = _batch([16384], model.window)
    full = replace(model, window=0, window_layers=0)
    gpu = get_gpu("H100")
    assert forward_parts(model, gpu, BF16, batch).attention < forward_parts(full, gpu, BF16, batch).attention


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"size": 0}, "greater than or equal to 1, not 0"),
        ({"size": 4, "copies": "telepathy"}, "'serial' or 'sliced'"),
        ({"size": 4, "depth": 0}, "depth: .* equal to 1"),
    ],
)
def test_bad_groups_are_rejected(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(PlannerError, match=message):
        Group(**settings_)


def test_too_few_local_experts_are_rejected() -> None:
    with pytest.raises(PlannerError, match="stores 64 to 256"):
        Group(4, local_experts=32).stored(load_model("deepseek-r1"))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(PlannerError, match="H100, H200"):
        get_gpu("TPU")
    with pytest.raises(PlannerError, match="mxfp4"):
        get_format("fp3")


@given(st.integers(2, 32), st.floats(0.01, 10), st.floats(0.01, 10))
def test_slowdown_lies_between_none_and_a_saturated_source(size: int, alone: float, window: float) -> None:
    factor = serial_slowdown(size, alone, window)
    assert 1 <= factor <= 1 + (size - 2) / (size - 1) + 1e-9
    assert serial_slowdown(size, alone, window * 2) <= factor + 1e-9
    assert serial_slowdown(2, alone, window) == 1  # two ranks never meet at a source


@pytest.mark.parametrize(("ranks", "expected"), [(1, 128), (2, 64), (3, 43), (5, 26)])
def test_the_largest_of_equal_shares(ranks: int, expected: int) -> None:
    assert equal_share(load_model("qwen3-30b-a3b"), ranks) == expected


def test_an_all_gather_brings_rows_of_other_ranks_experts() -> None:
    """By hand: zeros for k (2 I + H), k H read and H written by the sum, of (N-1) T tokens; none on AMD's kernels."""
    model, gpu = load_model("qwen3-30b-a3b"), get_gpu("H100")
    elements = 3 * 100 * (8 * (2 * 768 + 2048 + 2048) + 2048)
    expected = 48 * 2 * elements / (3.35e12 * 0.495)
    assert gathered_seconds(model, gpu, BF16, 100, 4, "all-gather") == pytest.approx(expected)
    assert gathered_seconds(model, gpu, BF16, 100, 4, "all-to-all") == 0
    assert gathered_seconds(model, get_gpu("MI355X"), BF16, 100, 4, "all-gather") == 0


def test_a_dep_forward_of_equal_batches_is_the_closed_forms() -> None:
    model, gpu, batch = load_model("qwen3-30b-a3b"), get_gpu("H100"), _batch([4096])
    estimate = dep(model, gpu, BF16, [[batch] * 2], "all-gather")
    seconds, _ = dep_forward(model, gpu, BF16, [batch] * 2, "all-gather")
    assert seconds == pytest.approx(estimate.seconds)
    slower, waited = dep_forward(model, gpu, BF16, [batch, Batch(0.0, 0.0)], "all-gather")
    assert slower > estimate.seconds / 2
    assert waited > 0


# tokens of a rank's forward: tokens/s of both ranks under expert parallelism and as replicas, measured on two H100 at
# SGLang's defaults with 12 layers of Qwen3-30B-A3B's shape (docs/performance.md)
MEASURED = {
    2048: (349_791, 379_538),
    4096: (367_677, 450_114),
    8192: (346_684, 421_535),
    16384: (284_900, 338_251),
}


@pytest.mark.parametrize("tokens", MEASURED)
def test_two_h100_are_predicted_within_15_percent(tokens: int) -> None:
    """Nothing is fitted to these servers."""
    model, gpu, batch = replace(load_model("qwen3-30b-a3b"), layers=12), get_gpu("H100"), _batch([tokens])
    dep_rate = 2 * dep(model, gpu, BF16, [[batch] * 2], "all-gather").tokens_per_second
    replicas = 2 * replica(model, gpu, BF16, batch).tokens_per_second
    assert dep_rate == pytest.approx(MEASURED[tokens][0], rel=0.15)
    assert replicas == pytest.approx(MEASURED[tokens][1], rel=0.15)


def test_one_peer_is_read_faster_than_several_that_all_read() -> None:
    h200, mi355x = get_gpu("H200"), get_gpu("MI355X")
    rates = [pull_bandwidth(h200, Group(size)) for size in (2, 3, 8)]
    assert rates == [h200.pair_bandwidth, h200.copy_bandwidth, h200.copy_bandwidth]
    assert rates[0] > rates[1]
    # A mesh has a wire for each pair.
    rates = [pull_bandwidth(mi355x, Group(size)) for size in (2, 3, 8)]
    assert rates == [mi355x.pair_bandwidth, 2 * mi355x.pair_bandwidth, mi355x.copy_bandwidth]


@pytest.mark.parametrize(("name", "slower"), [("H200", False), ("MI355X", True)])
def test_what_copies_reach_bounds_the_exchange_of_a_mesh_alone(name: str, slower: bool) -> None:
    gpu, model = get_gpu(name), load_model("gpt-oss-120b")
    precision = default_precision(FORMATS["mxfp4"])
    halved = replace(gpu, copy_bandwidth=gpu.copy_bandwidth / 2)
    before, after = (exchange_seconds(model, each, precision, 4096, 4, "all-gather") for each in (gpu, halved))
    assert (after > before) == slower


def test_a_byte_that_is_copied_costs_the_same_at_any_rate() -> None:
    gpu, model = get_gpu("H200"), load_model("gpt-oss-120b")
    precision, batch = default_precision(FORMATS["mxfp4"]), _batch([8192], model.window)
    found = [dwdp(model, gpu, precision, batch, Group(size)) for size in (2, 4)]
    costs = [each.parts.interference / each.fetch_bytes for each in found]
    assert costs[0] / costs[1] == pytest.approx(1)
