"""Part d: from how many tokens per rank DWDP beats expert parallelism, measured and planned (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.multi.variants import DEP, IN_TREE, OURS, REPLICAS
from sglang_dwdp.planner.cost import Group
from sglang_dwdp.planner.errors import PlannerError
from sglang_dwdp.planner.formats import default_precision, get_format
from sglang_dwdp.planner.gpus import Gpu, gpu_of_device
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.plan import Case, Point, evaluate
from sglang_dwdp.planner.workload import Lengths

GRID = tuple(256 * step for step in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128))
Rows = Sequence[Mapping[str, Any]]


def ratios(rows: Rows, variation: float, over: str) -> list[tuple[int, float]]:
    """(tokens, this plugin's rate over that of the variant `over`), by tokens; only what was measured of both."""
    found = [(row["length"], row["tokens_per_s"]) for row in rows if row["variation"] == variation]
    return sorted((length, rate[OURS] / rate[over]) for length, rate in found if OURS in rate and over in rate)


def crossover(points: Sequence[tuple[int, float]]) -> float | None:
    """Tokens from which the ratio stays at 1 or above, on a line between the two points around it.

    points: (tokens, ratio), by tokens; the line is over the tokens' logarithm. The first point's tokens where all are
    above, None where the last is below, or there are none.
    """
    if not points or points[-1][1] < 1:
        return None
    below = [index for index, (_, ratio) in enumerate(points) if ratio < 1]
    if not below:
        return float(points[0][0])
    (low, under), (high, over) = points[below[-1]], points[below[-1] + 1]
    share = (1 - under) / (over - under)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def describe(points: Sequence[tuple[int, float]]) -> str:
    """The crossover in words."""
    found = crossover(points)
    if not points:
        return "not measured"
    if found is None:
        return f"above {points[-1][0]:,}"
    return f"{points[0][0]:,} or less" if all(ratio >= 1 for _, ratio in points) else f"{found:,.0f}"


def worst_above(points: Sequence[tuple[int, float]], start: float | None) -> float | None:
    """The least ratio among measured points from `start` on."""
    above = [ratio for tokens, ratio in points if start is not None and tokens >= start]
    return min(above) if above else None


class Planned:
    """The planner's figures for the same checkpoint, GPU and number of GPUs.

    Raises:
        PlannerError: it does not know the model.
    """

    def __init__(self, model: str, gpu: Gpu, ranks: int) -> None:
        self._model = load_model(model)
        self._precision = default_precision(get_format(self._model.expert_format))
        self._gpu, self._group = gpu, Group(ranks)

    def at(self, tokens: int, variation: float) -> Point:
        """Forwards of one prompt each, of `tokens` at most."""
        lengths = Lengths("uniform" if variation else "fixed", tokens, ratio=1 - variation)
        return evaluate(Case(self._model, self._gpu, self._precision, lengths), self._group, tokens)

    def ratios(self, variation: float) -> list[tuple[int, float]]:
        """(tokens, ratio to expert parallelism) over the grid."""
        return [(tokens, self.at(tokens, variation).speedup) for tokens in GRID]

    def rates(self, tokens: int, variation: float) -> dict[str, float]:
        """Tokens per second of all ranks, by variant."""
        point = self.at(tokens, variation)
        estimates = {OURS: point.dwdp, DEP: point.dep, IN_TREE: point.in_tree, REPLICAS: point.replica}
        return {name: each.tokens_per_second * self._group.size for name, each in estimates.items() if each}


def find(servers: Mapping[str, Any], model: str, device: str | None, ranks: int) -> dict[str, Any]:
    """Crossovers by variation; planned ones too where the planner knows the GPU called `device`.

    model: a checkpoint folder, or a name that the planner knows.
    """
    rows: Rows = servers.get("prefill", ())
    gpu = gpu_of_device(device) if device else None
    found: dict[str, Any] = {"planner": gpu.name if gpu else None, "by_variation": []}
    planned = None
    if gpu is not None:
        try:
            planned = Planned(model, gpu, ranks)
        except PlannerError as error:  # what was measured counts without it
            found["planner_error"] = str(error)
    for variation in sorted({row["variation"] for row in rows}):
        measured = ratios(rows, variation, DEP)
        entry = {
            "variation": variation,
            "measured": crossover(measured),
            "measured_text": describe(measured),
            "ratio_to_dep": measured,
            "ratio_to_in_tree": ratios(rows, variation, IN_TREE),
        }
        if planned:
            expected = planned.ratios(variation)
            entry |= {"planned": crossover(expected), "planned_text": describe(expected), "planned_ratio": expected}
            lengths = sorted({row["length"] for row in rows if row["variation"] == variation})
            entry["planned_rates"] = {str(length): planned.rates(length, variation) for length in lengths}
        found["by_variation"].append(entry)
    return found
