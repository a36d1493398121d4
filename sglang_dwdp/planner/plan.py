"""Compare the schemes for one model on one node, and say what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import advise
from .checks import whole
from .compare import Case, Point, evaluate
from .cost import Group, in_tree_group
from .direct import direct_max_tokens
from .errors import PlannerError
from .memory import Memory, memory
from .workload import LONGEST

SWEEP = (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536)
# A difference below this is within the model's own error (docs/planner.md): call it a tie.
TIE = 0.03
# SGLang adds no further prompt to a forward that has --max-prefill-tokens, so a larger chunk needs more of them.
MAX_PREFILL_TOKENS = 16384


@dataclass(frozen=True)
class Plan:
    """The planner's answer.

    Attributes:
        case: what was planned for.
        group: its settings, as given or as found.
        gpus: of the node, a multiple of the group's size.
        points: the sweep over tokens per rank.
        crossover: tokens per rank from which DWDP beats DEP; None if it never does.
        hidden_from: tokens per rank from which copies are hidden entirely; None if never.
        chunk: ``--chunked-prefill-size`` per rank, as given or as found.
        direct_tokens: recommended ``--dwdp-direct-max-tokens``.
        memories: bytes by scheme at the chunk.
    """

    case: Case
    group: Group
    gpus: int
    points: tuple[Point, ...]
    crossover: int | None
    hidden_from: int | None
    chunk: int
    direct_tokens: int
    memories: dict[str, Memory]

    @property
    def title(self) -> str:
        """What was planned."""
        model, kept = self.case.model, self.group.stored(self.case.model)
        on = f"{self.group.size} x {self.case.gpu.name}, {kept} of {model.experts} experts per rank"
        return f"{model.name} ({self.case.precision.experts.name} experts) on {on}"

    @property
    def chosen(self) -> Point:
        """The sweep at the chunk."""
        return next(p for p in self.points if p.tokens == self.chunk)

    @property
    def pays(self) -> bool:
        """Whether DWDP fits and is no slower than DEP at the chunk."""
        return self.memories["dwdp"].fits and self.chosen.speedup >= 1

    @property
    def verdict(self) -> str:
        """One sentence: where DWDP pays, what to use elsewhere, and whether a replica is simpler."""
        clauses = [_against_dep(self)]
        if self.memories["dwdp"].fits and abs(self.chosen.speedup - 1) < TIE:
            clauses.append("the difference is within the model's error")
        if self.memories["replica"].fits:
            freed = self.memories["dwdp"].kv_cache - self.memories["replica"].kv_cache
            saved = f"the {freed / 1e9:.0f} GB that {_name(self)} frees for the KV cache matter"
            clauses.append("a replica fits one GPU: prefer replicas" + (f" unless {saved}" if freed > 0 else ""))
        return "; ".join(clauses) + "."

    @property
    def flags(self) -> tuple[str, ...]:
        """What to start a server with DWDP with; nothing where it does not fit."""
        if not self.memories["dwdp"].fits:
            return ()
        return (
            "--enable-dwdp",
            f"--tp-size {self.gpus}",
            *([f"--dwdp-group-size {self.group.size}"] if self.gpus > self.group.size else []),
            f"--chunked-prefill-size {self.chunk}",
            *([f"--max-prefill-tokens {self.chunk}"] if self.chunk > MAX_PREFILL_TOKENS else []),
            f"--dwdp-local-experts {self.group.stored(self.case.model)}",
            f"--dwdp-depth {self.group.depth}",
            f"--dwdp-direct-max-tokens {self.direct_tokens}",
        )


def _name(plan: Plan) -> str:
    return f"DWDP{plan.group.size}"


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:.1f}".rstrip("0").rstrip(".") + "k"


def remedies(case: Case, group: Group, *others: str) -> str:
    """What can be done where memory is short: ``others``, then what would make room."""
    found = list(others)
    if group.size < case.gpu.max_group:
        found.append("a larger group")
    if case.precision.experts.bytes_per_param > 1.5:
        found.append("FP8 or 4-bit experts")
    elif case.precision.experts.bytes_per_param > 0.75:
        found.append("4-bit experts")
    return " or ".join(filter(None, (", ".join(found), "GPUs with more memory")))


def _against_dep(plan: Plan) -> str:
    """DEP needs less memory than DWDP, so it fits wherever anything does."""
    name, gain = _name(plan), plan.chosen.speedup - 1
    elsewhere = remedies(plan.case, plan.group, "DEP")
    if not plan.memories["dwdp"].fits:
        return f"{name} does not fit: use {elsewhere}"
    if plan.group.local_experts:
        name += f" with {plan.group.local_experts} local experts"
    at_chunk = f"{gain:+.0%} over DEP at {_thousands(plan.chunk)}"
    if plan.crossover is None:
        longest, best = _thousands(plan.points[-1].tokens), max(p.speedup for p in plan.points)
        return f"{name} does not pay at up to {longest} tokens per rank (at best {best:.2f}x of DEP): use DEP"
    if plan.crossover <= plan.points[0].tokens:
        return f"{name} pays at any prefill size ({at_chunk})"
    above = f"above {_thousands(plan.crossover)} tokens per rank"
    if gain >= 0:
        return f"{name} pays {above} ({at_chunk}); use DEP below"
    if advise.leaves_room(plan.case, plan.group, plan.crossover):
        return f"{name} pays {above}, not at {_thousands(plan.chunk)} ({at_chunk}): use DEP or larger chunks"
    return f"{name} would pay {above}, but no more than {_thousands(plan.chunk)} fit ({at_chunk}): use {elsewhere}"


def make_plan(
    case: Case,
    group: Group,
    gpus: int = 0,
    *,
    tokens: int = 0,
    choose_local_experts: bool = False,
    choose_depth: bool = False,
) -> Plan:
    """Sweep tokens per rank, find the crossover, choose settings.

    Args:
        gpus: of the node, a multiple of the group's size; 0 for one group.
        tokens: per rank and forward, where the user has decided; 0 finds the chunk.
        choose_local_experts: more than ``group`` says where that hides the copies at the chunk and memory allows.
        choose_depth: more slots than two where that saves time and memory allows.

    Raises:
        PlannerError: if the group is larger than the GPU's link domain, or neither DWDP nor DEP nor a replica fits.
    """
    model, gpu, precision = case.model, case.gpu, case.precision
    if group.size > gpu.max_group:
        raise PlannerError(
            f"{gpu.name} links {gpu.max_group} GPUs; a group of {group.size} would leave the domain. "
            f"Use --group-size {gpu.max_group} or less."
        )
    if group.size < 2:
        raise PlannerError("a plan compares ways to share experts, so it needs at least 2 GPUs in a group")
    if tokens:
        whole("tokens per rank", tokens, 1, LONGEST)
    sweep = sorted({*SWEEP, tokens} - {0})

    def at(count: int) -> Point:
        return evaluate(case, group, count)

    chunk = tokens or advise.chunk_size(case, group, [at(count) for count in sweep])
    if choose_depth:
        group = replace(group, depth=advise.depth(case, group, chunk))
    if choose_local_experts:
        group = replace(group, local_experts=advise.local_experts(case, group, chunk))
    points = tuple(at(count) for count in sweep)
    schemes = ("replica", "dep", "dwdp", "in-tree dwdp")
    sharing = {name: in_tree_group(group.size) if name == "in-tree dwdp" else group for name in schemes}
    memories = {name: memory(model, gpu, precision, name, sharing[name], chunk) for name in schemes}
    if not any(m.fits for m in memories.values()):
        raise PlannerError(
            f"{model.name} in {precision.experts.name} fits {group.size} x {gpu.name} under no scheme; "
            f"use {remedies(case, group)}"
        )
    return Plan(
        case=case,
        group=group,
        gpus=gpus or group.size,
        points=points,
        crossover=advise.crossover(points, lambda p: p.speedup >= 1.0, at),
        hidden_from=advise.crossover(points, lambda p: p.hidden, at),
        chunk=chunk,
        direct_tokens=direct_max_tokens(
            model,
            gpu,
            group.size,
            weight_format=precision.experts.name,
            local_experts=group.local_experts,
            depth=group.depth,
        ),
        memories=memories,
    )
