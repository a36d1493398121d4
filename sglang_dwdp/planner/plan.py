"""Compare the schemes for one model on one node, and say what to do."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sglang_dwdp.exchange.policy import joint_prefill_pays, prefill_buckets
from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.cost import Estimate, Group, dwdp, in_tree_group, replica
from sglang_dwdp.planner.decode import SEQUENCES, Step, decode_step
from sglang_dwdp.planner.dep import Exchange, dep
from sglang_dwdp.planner.formats import Precision
from sglang_dwdp.planner.gpus import Gpu
from sglang_dwdp.planner.memory import Memory, memory
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.workload import Lengths, mean_batch, typical_rounds

SWEEP = (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536)
FINE = 256  # tokens to which a crossover is found
# A difference below this is within the model's own error (docs/planner.md): call it a tie.
TIE = 0.03
# SGLang adds no further prompt to a forward that has --max-prefill-tokens, so a larger chunk needs more of them.
MAX_PREFILL_TOKENS = 16384
MEMORY_FOR_KV = 4e9  # bytes


@dataclass(frozen=True)
class Case:
    """What is planned for: everything but the group's settings and the tokens."""

    model: ModelShape
    gpu: Gpu
    precision: Precision
    lengths: Lengths
    exchange: Exchange = "all-gather"


@dataclass(frozen=True)
class Point:
    """All schemes at one token count per rank.

    Attributes:
        tokens: per rank.
        dwdp: every rank alone.
        together: with `--dwdp-exchange auto`, all ranks at once; None for prefills that are never joint.
        dep: attention data parallelism with expert parallelism.
        in_tree: SGLang's `--dwdp-size`.
        replica: None where it does not fit.
    """

    tokens: int
    dwdp: Estimate
    together: Estimate | None
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
    """All schemes at `tokens` per rank and forward, prompts cut into chunks of that size."""
    model, gpu, precision = case.model, case.gpu, case.precision
    rounds = typical_rounds(case.lengths, tokens, True, max(1, group.size), model.window, 64)
    batch = mean_batch(rounds)
    single = memory(model, gpu, precision, "replica", group, tokens)
    alone, joint = dwdp(model, gpu, precision, batch, group), dep(model, gpu, precision, rounds)
    has_graph = tokens <= max(prefill_buckets(SWEEP, group.size), default=0)
    is_joint = has_graph and joint_prefill_pays(alone.seconds, joint.seconds)
    return Point(
        tokens=tokens,
        dwdp=alone,
        together=replace(joint, scheme="together") if is_joint else None,
        dep=dep(model, gpu, precision, rounds, case.exchange),
        in_tree=dwdp(model, gpu, precision, batch, in_tree_group(group.size), "in-tree dwdp"),
        replica=replica(model, gpu, precision, batch) if single.fits else None,
    )


@dataclass(frozen=True)
class Plan:
    """The planner's answer.

    Attributes:
        case: what was planned for.
        group: its settings, as given or as found.
        gpus: of the node, a multiple of the group's size.
        points: the sweep over tokens per rank.
        crossover: tokens per rank from which DWDP beats DEP; None if it never does.
        chunk: `--chunked-prefill-size` per rank, as given or as found.
        memories: bytes by scheme at the chunk.
        decode: steps of a server that decodes too, after prompts of the longest length.
        smaller: The size of the smallest groups that leave room for the KV cache too, and the tokens per rank from
            which they beat DEP on all GPUs of `group`; None where those are no fewer than `crossover`.
    """

    case: Case
    group: Group
    gpus: int
    points: tuple[Point, ...]
    crossover: int | None
    chunk: int
    memories: dict[str, Memory]
    decode: tuple[Step, ...]
    smaller: tuple[int, int] | None = None

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
        if self.smaller:
            clauses.append("groups of {} fit too, and pay above {:,}".format(*self.smaller))
        if self.memories["replica"].fits:
            freed = self.memories["dwdp"].kv_cache - self.memories["replica"].kv_cache
            saved = f"the {freed / 1e9:.0f} GB that DWDP{self.group.size} frees for the KV cache matter"
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
        )


def _against_dep(plan: Plan) -> str:
    """DEP needs less memory than DWDP, so it fits wherever anything does."""
    name, gain = f"DWDP{plan.group.size}", plan.chosen.speedup - 1
    if not plan.memories["dwdp"].fits:
        return f"{name} does not fit: use DEP, a larger group, smaller weights or GPUs with more memory"
    if plan.group.local_experts:
        name += f" with {plan.group.local_experts} local experts"
    if plan.crossover is None:
        longest, best = plan.points[-1].tokens, max(p.speedup for p in plan.points)
        return f"{name} does not pay at up to {longest:,} tokens per rank (at best {best:.2f}x of DEP): use DEP"
    at_chunk = f"{gain:+.0%} over DEP at {plan.chunk:,}"
    above = f"above {plan.crossover:,} tokens per rank"
    if gain >= 0:
        return f"{name} pays {above} ({at_chunk}); below, use --dwdp-exchange auto or DEP"
    room = _leaves_room(plan.case, plan.group, plan.crossover)
    larger = "larger chunks" if room else "make room for larger chunks: a larger group, smaller weights"
    return f"{name} would pay {above}, not at {plan.chunk:,} ({at_chunk}): use DEP or {larger}"


def _crossover(points: Sequence[Point], at: Callable[[int], Point]) -> int | None:
    """Smallest token count (to `FINE` tokens) from which DWDP is no slower than DEP over the sweep."""
    start = len(points)
    while start > 0 and points[start - 1].speedup >= 1:
        start -= 1
    if start in (0, len(points)):
        return points[0].tokens if start == 0 else None
    between = range(points[start - 1].tokens + FINE, points[start].tokens, FINE)
    first = bisect_left(between, True, key=lambda tokens: at(tokens).speedup >= 1)
    return between[first] if first < len(between) else points[start].tokens


def _leaves_room(case: Case, group: Group, tokens: int) -> bool:
    return memory(case.model, case.gpu, case.precision, "dwdp", group, tokens).kv_cache >= MEMORY_FOR_KV


def _chunk(case: Case, group: Group, points: Sequence[Point]) -> int:
    """Smallest chunk within 5 % of the best rate that leaves room for some KV cache."""
    candidates = [p for p in points if _leaves_room(case, group, p.tokens)] or list(points[:1])
    best = max(p.dwdp.tokens_per_second for p in candidates)
    return next(p.tokens for p in candidates if p.dwdp.tokens_per_second >= 0.95 * best)


def _local_experts(case: Case, group: Group, tokens: int) -> int:
    """Fewest experts per rank whose copies `tokens` tokens hide; 0, equal shares, where memory does not allow it."""
    share = replace(group, local_experts=0).stored(case.model)
    counts = range(share, case.model.experts + 1)  # with all experts at home there is nothing to hide
    hidden = bisect_left(counts, True, key=lambda n: evaluate(case, replace(group, local_experts=n), tokens).hidden)
    count = counts[hidden]
    return count if count > share and _leaves_room(case, replace(group, local_experts=count), tokens) else 0


def _smaller(case: Case, group: Group, chunk: int, crossover: int | None) -> tuple[int, int] | None:
    """See `Plan.smaller`."""
    parts = (replace(group, size=size, local_experts=0) for size in range(2, group.size) if group.size % size == 0)
    part = next((part for part in parts if _leaves_room(case, part, chunk)), None)
    if part is None:
        return None

    def at(tokens: int) -> Point:
        return replace(evaluate(case, group, tokens), dwdp=evaluate(case, part, tokens).dwdp)

    found = _crossover([at(tokens) for tokens in SWEEP], at)
    return (part.size, found) if found is not None and (crossover is None or found < crossover) else None


def make_plan(case: Case, group: Group, gpus: int = 0, *, tokens: int = 0, choose_local_experts: bool = False) -> Plan:
    """Sweep tokens per rank, find the crossover, choose settings.

    Args:
        gpus: of the node, a multiple of the group's size; 0 for one group.
        tokens: per rank and forward, where the user has decided; 0 finds the chunk.
        choose_local_experts: more than `group` says where that hides the copies at the chunk and memory allows.

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
    sweep = sorted({*SWEEP, tokens} - {0})

    def at(count: int) -> Point:
        return evaluate(case, group, count)

    chunk = tokens or _chunk(case, group, [at(count) for count in sweep])
    if choose_local_experts:
        group = replace(group, local_experts=_local_experts(case, group, chunk))
    points = tuple(at(count) for count in sweep)
    in_tree = in_tree_group(group.size)
    memories = {
        name: memory(model, gpu, precision, name, in_tree if name == "in-tree dwdp" else group, chunk)
        for name in ("replica", "dep", "dwdp", "in-tree dwdp")
    }
    if not any(m.fits for m in memories.values()):
        raise PlannerError(
            f"{model.name} in {precision.experts.name} fits {group.size} x {gpu.name} under no scheme: take a larger "
            "group, smaller weights or GPUs with more memory"
        )
    crossover = _crossover(points, at)
    return Plan(
        case=case,
        group=group,
        gpus=gpus or group.size,
        points=points,
        crossover=crossover,
        smaller=_smaller(case, group, chunk, crossover),
        chunk=chunk,
        memories=memories,
        decode=tuple(decode_step(model, gpu, precision, group, count, case.lengths.length) for count in SEQUENCES),
    )
