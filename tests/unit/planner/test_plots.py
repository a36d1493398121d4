"""Figures: the stretch of a timeline that is shown, and that every mode can be drawn."""

from dataclasses import replace
from pathlib import Path

import pytest

from sglang_dwdp.planner.cost import Group
from sglang_dwdp.planner.formats import FORMATS, default_precision
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.outcome import Span
from sglang_dwdp.planner.plan import make_plan
from sglang_dwdp.planner.plots import TIMELINE_KERNELS, _window, plot_plan, plot_results
from sglang_dwdp.planner.scenario import Scenario
from sglang_dwdp.planner.simulate import simulate
from sglang_dwdp.planner.workload import Lengths
from tests.unit.planner.test_plan import _case


def _scenario(mode: str, rate: float = 0.0) -> Scenario:
    precision = default_precision(FORMATS["bf16"])
    lengths = Lengths("uniform", 2000, ratio=0.5)
    return Scenario(
        load_model("qwen3-30b-a3b"), get_gpu("H200"), precision, lengths, mode, group_size=2, requests=8, rate=rate
    )


def test_the_stretch_shown_is_one_in_which_all_ranks_work() -> None:
    alone = [Span(0, "compute", float(i), i + 1.0) for i in range(2 * TIMELINE_KERNELS)]
    late = [Span(1, "compute", i + TIMELINE_KERNELS + 0.0, i + TIMELINE_KERNELS + 1.0) for i in range(TIMELINE_KERNELS)]
    assert _window([*alone, *late], [0, 1]) == (TIMELINE_KERNELS, 2 * TIMELINE_KERNELS)
    # and if all are equally busy, one in which they wait
    waits = [Span(1, "wait", float(i), i + 1.0) for i in range(TIMELINE_KERNELS)]
    assert _window([*alone, *late, *waits], [0, 1]) == (0, TIMELINE_KERNELS)
    assert _window([Span(3, "forward", 1.0, 2.0)], [3]) == (1.0, 2.0)


@pytest.mark.parametrize("mode", ["dwdp", "dep", "replica"])
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_every_mode_can_be_drawn(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"figure{suffix}"
    plot_results([simulate(_scenario(mode)), simulate(_scenario(mode, rate=0.5))], str(path))
    assert path.stat().st_size > 5000


def test_timelines_are_of_the_first_group_only() -> None:
    result = simulate(replace(_scenario("dwdp"), groups=3, requests=24))
    assert {span.rank for span in result.timeline} == {0, 1}


def test_plans_that_do_not_fit_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    plot_plan(make_plan(_case("qwen3-235b-a22b", "H100", "bf16"), Group(8)), str(path))
    assert "GB in all" in path.read_text()
