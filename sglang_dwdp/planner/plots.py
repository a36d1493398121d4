"""Figures: rates of a plan, TTFT of simulations. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.plan import Plan
from sglang_dwdp.planner.simulate import Result

FIGURES = (".pdf", ".png", ".svg")


def _axes() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.grid(alpha=0.3)
    return figure, axes


def check_figure(path: str) -> None:
    """Raise PlannerError unless a figure can be written to `path`, before anything is computed for it."""
    file = Path(path)
    if not file.parent.is_dir() or file.suffix.lower() not in FIGURES:
        raise PlannerError(f"cannot write {path}: give a name in a folder that exists, ending in {', '.join(FIGURES)}")


def plot_plan(plan: Plan, path: str) -> None:
    """Write a PNG, PDF or SVG: tokens per second and GPU of all schemes, by tokens per rank."""
    figure, axes = _axes()
    for style, scheme in zip(("-", "--", "-.", ":"), ("dwdp", "dep", "in_tree", "replica"), strict=True):
        found = [(p.tokens, getattr(p, scheme)) for p in plan.points]
        fitting = [(tokens, estimate.tokens_per_second) for tokens, estimate in found if estimate]
        if fitting:
            axes.plot(*zip(*fitting, strict=True), style, marker=".", label=scheme.replace("_", "-"))
    if plan.crossover:
        axes.axvline(plan.crossover, color="grey", linewidth=1)
    axes.set(title=plan.title, xlabel="tokens per rank and forward", ylabel="tokens/s per GPU", xscale="log")
    axes.legend()
    figure.savefig(path)


def plot_results(results: Sequence[Result], path: str) -> None:
    """Write a PNG, PDF or SVG: how TTFT is distributed in each scenario."""
    figure, axes = _axes()
    for index, result in enumerate(results):
        style = ("-", "--", "-.", ":")[index % 4]  # curves that coincide stay visible
        axes.ecdf(result.ttft, linestyle=style, label=result.scenario.name)
    axes.set(xlabel="TTFT (s)", ylabel="share of requests")
    axes.legend()
    figure.savefig(path)
