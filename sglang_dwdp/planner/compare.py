"""All schemes side by side at one number of tokens per rank."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dwdp.planner.cost import Estimate, Group, dwdp, in_tree_group, replica
from sglang_dwdp.planner.dep import dep
from sglang_dwdp.planner.formats import Precision
from sglang_dwdp.planner.gpu import Gpu
from sglang_dwdp.planner.memory import memory
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.workload import Lengths, mean_batch, typical_rounds


@dataclass(frozen=True)
class Case:
    """What is planned for: everything but the group's settings and the tokens."""

    model: ModelShape
    gpu: Gpu
    precision: Precision
    lengths: Lengths
    exchange: str = "all-gather"


@dataclass(frozen=True)
class Point:
    """All schemes at one token count per rank; ``replica`` is None where it does not fit."""

    tokens: int
    dwdp: Estimate
    dep: Estimate
    in_tree: Estimate
    replica: Estimate | None

    @property
    def speedup(self) -> float:
        """DWDP's tokens per second and GPU over DEP's."""
        return self.dwdp.tokens_per_second / self.dep.tokens_per_second

    @property
    def hidden(self) -> bool:
        """Whether compute hides the copies, to 1 % of it."""
        return self.dwdp.parts.exposed_copy <= 0.01 * self.dwdp.compute


def evaluate(case: Case, group: Group, tokens: int) -> Point:
    """All schemes at ``tokens`` per rank and forward, prompts cut into chunks of that size."""
    model, gpu, precision = case.model, case.gpu, case.precision
    rounds = typical_rounds(case.lengths, tokens, True, max(1, group.size), model.window, 64)
    batch = mean_batch(rounds)
    single = memory(model, gpu, precision, "replica", group, tokens)
    return Point(
        tokens=tokens,
        dwdp=dwdp(model, gpu, precision, batch, group),
        dep=dep(model, gpu, precision, rounds, case.exchange),
        in_tree=dwdp(model, gpu, precision, batch, in_tree_group(group.size), "in-tree dwdp"),
        replica=replica(model, gpu, precision, batch) if single.fits else None,
    )
