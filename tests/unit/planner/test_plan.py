"""Plans: crossover, verdict, settings, memory."""

from dataclasses import replace

import pytest

from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.cost import Group
from sglang_dwdp.planner.formats import FORMATS, default_precision
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.memory import memory
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.plan import SWEEP, Case, Plan, evaluate, make_plan
from sglang_dwdp.planner.workload import Lengths

LENGTHS = Lengths("uniform", 8192, ratio=0.8)


def _case(name: str, gpu: str, fmt: str) -> Case:
    return Case(load_model(name), get_gpu(gpu), default_precision(FORMATS[fmt]), LENGTHS)


def _plan(name: str, gpu: str, size: int, fmt: str) -> Plan:
    return make_plan(_case(name, gpu, fmt), Group(size))


def test_where_a_replica_fits_it_is_preferred() -> None:
    plan = _plan("gpt-oss-120b", "H200", 4, "mxfp4")
    assert plan.memories["replica"].fits
    assert "prefer replicas" in plan.verdict
    assert "DWDP4 pays above" in plan.verdict
    freed = plan.memories["dwdp"].kv_cache - plan.memories["replica"].kv_cache
    assert f"{freed / 1e9:.0f} GB" in plan.verdict


@pytest.mark.parametrize(("size", "largest"), [(2, 2048), (8, 2048)])
def test_short_prefills_are_planned_together_too(size: int, largest: int) -> None:
    plan = _plan("gpt-oss-120b", "H200", size, "mxfp4")
    assert [p.tokens for p in plan.points if p.together] == [tokens for tokens in SWEEP if tokens <= largest]
    first = plan.points[0]
    assert first.together
    assert first.together.seconds < min(first.dep.seconds, first.dwdp.seconds)


def test_where_none_fits_replicas_are_not_mentioned() -> None:
    plan = _plan("deepseek-r1", "H200", 8, "fp8")
    assert not plan.memories["replica"].fits
    assert all(p.replica is None for p in plan.points)
    assert "replica" not in plan.verdict
    assert plan.memories["dwdp"].fits


def test_the_crossover_separates_loss_from_gain() -> None:
    plan = _plan("deepseek-r1", "GB200", 4, "nvfp4")
    assert plan.crossover is not None
    below = evaluate(plan.case, plan.group, int(plan.crossover * 0.8))
    above = evaluate(plan.case, plan.group, int(plan.crossover * 1.1))
    assert below.speedup < 1 <= above.speedup
    assert f"--chunked-prefill-size {plan.chunk}" in plan.flags
    assert plan.chunk > plan.crossover


def test_the_flags_say_everything_that_was_planned_with() -> None:
    case = _case("deepseek-r1", "GB200", "nvfp4")
    plain = make_plan(case, Group(4))
    assert plain.flags == (
        "--enable-dwdp",
        "--tp-size 4",
        f"--chunked-prefill-size {plain.chunk}",
        f"--max-prefill-tokens {plain.chunk}",  # SGLang's default would end forwards at 16,384
        "--dwdp-local-experts 64",
        "--dwdp-depth 2",
    )
    assert plain.chunk > 16384
    more = make_plan(case, Group(4, local_experts=80, depth=3), gpus=8)
    assert {"--tp-size 8", "--dwdp-group-size 4", "--dwdp-local-experts 80", "--dwdp-depth 3"} <= set(more.flags)
    assert more.memories["dwdp"].experts > plain.memories["dwdp"].experts
    # SGLang's own DWDP stores equal shares whatever the plugin is asked for
    assert more.memories["in-tree dwdp"].experts == plain.memories["in-tree dwdp"].experts
    small = _plan("qwen3-30b-a3b", "H100", 2, "bf16")
    assert any("--max-prefill-tokens" in flag for flag in small.flags) == (small.chunk > 16384)


def test_a_slow_link_gets_a_no() -> None:
    gpu = replace(get_gpu("H100"), copy_bandwidth=5e9, pair_bandwidth=5e9)
    plan = make_plan(replace(_case("gpt-oss-120b", "H100", "mxfp4"), gpu=gpu, exchange="all-to-all"), Group(4))
    # DEP's exchange crosses the same slow link, so compare where it matters: few tokens
    assert plan.points[0].speedup < 0.2
    assert not any(p.hidden for p in plan.points if p.tokens <= 16384)


def test_groups_beyond_the_link_domain_are_rejected() -> None:
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


def test_a_chunk_that_memory_forbids_is_not_advised() -> None:
    plan = _plan("kimi-k2", "B200", 8, "fp8")
    assert plan.crossover is not None
    assert plan.chunk < plan.crossover
    assert not plan.pays
    assert plan.verdict.startswith("DWDP8 would pay above")
    assert "use DEP or make room for larger chunks" in plan.verdict


def test_where_dwdp_does_not_fit_there_is_nothing_to_set() -> None:
    plan = _plan("qwen3-235b-a22b", "H100", 8, "bf16")
    assert plan.verdict == "DWDP8 does not fit: use DEP, a larger group, smaller weights or GPUs with more memory."
    assert plan.flags == ()
    assert not plan.pays


def test_a_chunk_below_the_crossover_is_told_so() -> None:
    plan = make_plan(_case("qwen3-30b-a3b", "H100", "bf16"), Group(4), tokens=3000)
    assert plan.chosen.tokens == plan.chunk == 3000
    assert [p.tokens for p in plan.points] == sorted(p.tokens for p in plan.points)
    assert "not at 3,000 (-" in plan.verdict
    assert "larger chunks" in plan.verdict
    assert not plan.pays


@pytest.mark.parametrize(
    ("name", "gpu", "fmt", "size", "smaller"),
    [
        ("qwen3-30b-a3b", "H200", "bf16", 4, 2),
        ("gpt-oss-120b", "H100", "mxfp4", 6, 2),
        ("deepseek-r1", "H200", "fp8", 8, None),  # 4 do not fit
        ("qwen3-30b-a3b", "H200", "bf16", 3, None),  # no part of it is a group
        ("qwen3-30b-a3b", "H200", "bf16", 2, None),
    ],
)
def test_smaller_groups_that_fit_are_named(name: str, gpu: str, fmt: str, size: int, smaller: int | None) -> None:
    plan = _plan(name, gpu, size, fmt)
    assert (plan.smaller and plan.smaller[0]) == smaller
    assert (f"groups of {smaller} fit too" in plan.verdict) == (smaller is not None)
    if plan.smaller:
        count, crossover = plan.smaller
        assert plan.crossover is not None
        assert crossover < plan.crossover
        part, dep = evaluate(plan.case, Group(count), crossover).dwdp, evaluate(plan.case, plan.group, crossover).dep
        assert part.tokens_per_second >= dep.tokens_per_second


def test_as_few_experts_are_kept_as_hide_the_copies() -> None:
    case = _case("gpt-oss-120b", "H200", "mxfp4")
    plan = make_plan(case, Group(8), tokens=2048, choose_local_experts=True)
    count = plan.group.local_experts
    assert count > 16
    assert plan.chosen.hidden
    assert not evaluate(case, replace(plan.group, local_experts=count - 1), 2048).hidden
    assert f"--dwdp-local-experts {count}" in plan.flags
    assert f"DWDP8 with {count} local experts" in plan.verdict
    # with a chunk that hides all copies, equal shares are enough
    assert make_plan(case, Group(8), tokens=32768, choose_local_experts=True).group.local_experts == 0
    # and where memory does not allow more, so it stays
    assert make_plan(_case("kimi-k2", "B200", "fp8"), Group(8), choose_local_experts=True).group.local_experts == 0
