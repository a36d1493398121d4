"""Plans: crossover, verdict, memory, and the direct view's threshold."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_dwdp.planner.cost import Group, dwdp
from sglang_dwdp.planner.direct import direct_max_tokens, direct_seconds, expected_remote_experts
from sglang_dwdp.planner.errors import PlannerError
from sglang_dwdp.planner.formats import FORMATS, default_precision
from sglang_dwdp.planner.gpus import GPUS, Gpu, get_gpu
from sglang_dwdp.planner.memory import memory, replicated_bytes
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.plan import Plan, evaluate, make_plan
from sglang_dwdp.planner.workload import Batch, Lengths

LENGTHS = Lengths("uniform", 8192, ratio=0.8)
MODEL_NAMES = ("qwen3-30b-a3b", "gpt-oss-20b", "gpt-oss-120b", "deepseek-r1", "mixtral-8x7b")


def _plan(name: str, gpu: str, size: int, fmt: str) -> Plan:
    return make_plan(load_model(name), get_gpu(gpu), default_precision(FORMATS[fmt]), Group(size), LENGTHS)


def test_where_a_replica_fits_it_is_preferred() -> None:
    plan = _plan("gpt-oss-120b", "H200", 4, "mxfp4")
    assert plan.memories["replica"].fits
    assert "prefer replicas" in plan.verdict
    assert "DWDP4 pays above" in plan.verdict
    freed = plan.memories["dwdp"].kv_cache - plan.memories["replica"].kv_cache
    assert f"{freed / 1e9:.0f} GB" in plan.verdict


def test_where_none_fits_replicas_are_not_mentioned() -> None:
    plan = _plan("deepseek-r1", "H200", 8, "fp8")
    assert not plan.memories["replica"].fits
    assert all(p.replica is None for p in plan.points)
    assert "replica" not in plan.verdict
    assert plan.memories["dwdp"].fits


def test_the_crossover_separates_loss_from_gain() -> None:
    plan = _plan("deepseek-r1", "GB200", 4, "nvfp4")
    assert plan.crossover is not None
    model, gpu, precision = plan.model, plan.gpu, plan.precision
    below = evaluate(model, gpu, precision, plan.group, LENGTHS, int(plan.crossover * 0.8))
    above = evaluate(model, gpu, precision, plan.group, LENGTHS, int(plan.crossover * 1.1))
    assert below.speedup < 1 <= above.speedup
    assert f"--chunked-prefill-size {plan.chunk}" in plan.flags
    assert plan.chunk > plan.crossover


def test_the_flags_say_everything_that_was_planned_with() -> None:
    model, gpu = load_model("deepseek-r1"), get_gpu("GB200")
    precision = default_precision(FORMATS["nvfp4"])
    plain = make_plan(model, gpu, precision, Group(4), LENGTHS)
    assert plain.flags == (
        "--enable-dwdp",
        "--tp-size 4",
        f"--chunked-prefill-size {plain.chunk}",
        f"--max-prefill-tokens {plain.chunk}",  # SGLang's default would end forwards at 16,384
        "--dwdp-local-experts 64",
        "--dwdp-depth 2",
        f"--dwdp-direct-max-tokens {plain.direct_tokens}",
    )
    assert plain.chunk > 16384
    more = make_plan(model, gpu, precision, Group(4, local_experts=80, depth=3), LENGTHS, gpus=8)
    assert {"--tp-size 8", "--dwdp-group-size 4", "--dwdp-local-experts 80", "--dwdp-depth 3"} <= set(more.flags)
    assert more.memories["dwdp"].experts > plain.memories["dwdp"].experts
    # SGLang's own DWDP stores equal shares whatever is asked of ours
    assert more.memories["in-tree dwdp"].experts == plain.memories["in-tree dwdp"].experts
    small = make_plan(
        load_model("qwen3-30b-a3b"), get_gpu("H100"), default_precision(FORMATS["bf16"]), Group(2), LENGTHS
    )
    assert any("--max-prefill-tokens" in flag for flag in small.flags) == (small.chunk > 16384)


def test_a_slow_link_gets_a_no() -> None:
    gpu = replace(get_gpu("H100"), copy_bandwidth=5e9, pair_bandwidth=5e9)
    plan = make_plan(
        load_model("gpt-oss-120b"),
        gpu,
        default_precision(FORMATS["mxfp4"]),
        Group(4),
        LENGTHS,
        "all-to-all",
    )
    # DEP's exchange crosses the same slow link, so compare where it matters: few tokens
    assert plan.points[0].speedup < 0.2
    assert plan.hidden_from is None or plan.hidden_from > 32768


def test_groups_beyond_the_link_domain_are_refused() -> None:
    with pytest.raises(PlannerError, match="--group-size 8"):
        _plan("deepseek-r1", "H200", 16, "fp8")
    with pytest.raises(PlannerError, match="at least 2"):
        _plan("mixtral-8x7b", "H200", 1, "bf16")
    with pytest.raises(PlannerError, match="under no scheme"):
        _plan("kimi-k2", "H100", 8, "bf16")


def test_memory_parts_add_up() -> None:
    model, gpu = load_model("qwen3-30b-a3b"), get_gpu("H100")
    precision = default_precision(FORMATS["bf16"])
    for scheme in ("replica", "dep", "dwdp", "in-tree dwdp"):
        m = memory(model, gpu, precision, scheme, Group(4), 8192)
        parts = m.attention + m.experts + m.slots + m.activations + m.runtime + m.kv_cache
        assert parts == pytest.approx(gpu.memory)
    whole = memory(model, gpu, precision, "replica", Group(4), 1)
    weights = whole.attention + whole.experts
    assert weights == pytest.approx(2 * model.total_params, rel=1e-6)
    assert replicated_bytes(model, precision) == whole.attention


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(MODEL_NAMES),
    st.sampled_from(list(GPUS.values())),
    st.integers(2, 8),
)
def test_direct_threshold_is_where_the_direct_view_stops_winning(name: str, gpu: Gpu, size: int) -> None:
    model = load_model(name)
    tokens = direct_max_tokens(model, gpu, size)
    precision = default_precision(FORMATS[model.expert_format])

    def wins(count: int) -> bool:
        batch = Batch(float(count), float(count), window_pairs=float(count))
        staged = dwdp(model, gpu, precision, batch, Group(size)).seconds
        return direct_seconds(model, gpu, precision, count, Group(size)) <= staged

    assert tokens >= 1  # one token needs a few experts, not all of them
    assert wins(tokens)
    assert not wins(tokens + 1)


@given(st.sampled_from(MODEL_NAMES), st.integers(2, 8), st.integers(1, 5000))
def test_remote_experts_grow_with_tokens_up_to_all(name: str, size: int, tokens: int) -> None:
    model, group = load_model(name), Group(size)
    some = expected_remote_experts(model, tokens, group)
    assert some <= expected_remote_experts(model, tokens + 1, group) + 1e-9
    assert 0 < some <= model.experts - group.stored(model) + 1e-9
    one = expected_remote_experts(model, 1, group)
    assert one == pytest.approx(model.top_k * (1 - group.stored(model) / model.experts))


def test_with_every_expert_at_home_direct_has_no_limit() -> None:
    model = load_model("mixtral-8x7b")
    assert direct_max_tokens(model, get_gpu("H100"), 2, local_experts=8, limit=4096) == 4096
    with pytest.raises(PlannerError, match="at least 1"):
        direct_max_tokens(model, get_gpu("H100"), 2, limit=0)


def test_a_slower_direct_read_lowers_the_threshold() -> None:
    model, gpu = load_model("qwen3-30b-a3b"), get_gpu("H200")
    slow_kernel = replace(gpu, link_bandwidth=gpu.link_bandwidth * 4)  # poorer packets, same copies
    assert slow_kernel.direct_read_bandwidth < gpu.link_bandwidth
    assert direct_max_tokens(model, gpu, 4) >= 1
