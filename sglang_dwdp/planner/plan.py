"""Compare the schemes for one model on one node, and say what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .cost import Estimate, Group, dwdp, in_tree_group, replica
from .dep import dep
from .direct import direct_max_tokens
from .errors import PlannerError
from .formats import Precision
from .gpus import Gpu
from .memory import Memory, memory
from .models import ModelShape
from .workload import Lengths, mean_batch, typical_rounds

SWEEP = (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536)
# A difference below this is within the model's own error (docs/planner.md): call it a tie.
TIE = 0.03
MEMORY_FOR_KV = 4e9
FINE_CHUNK = 256
# SGLang adds no further prompt to a forward that has --max-prefill-tokens, so a larger chunk needs more of them.
MAX_PREFILL_TOKENS = 16384


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


@dataclass(frozen=True)
class Plan:
    """The planner's answer.

    Attributes:
        points: the sweep over tokens per rank.
        crossover: tokens per rank from which DWDP beats DEP; None if it never does.
        hidden_from: tokens per rank from which copies are hidden entirely; None if never.
        chunk: recommended ``--chunked-prefill-size`` per rank.
        direct_tokens: recommended ``--dwdp-direct-max-tokens``.
        memories: bytes by scheme at the recommended chunk.
        verdict: one sentence.
        flags: what to start the server with.
    """

    model: ModelShape
    gpu: Gpu
    precision: Precision
    group: Group
    lengths: Lengths
    points: tuple[Point, ...]
    crossover: int | None
    hidden_from: int | None
    chunk: int
    direct_tokens: int
    memories: dict[str, Memory]
    verdict: str
    flags: tuple[str, ...]


def evaluate(
    model: ModelShape,
    gpu: Gpu,
    precision: Precision,
    group: Group,
    lengths: Lengths,
    tokens: int,
    exchange: str = "all-gather",
) -> Point:
    """All schemes at ``tokens`` per rank and forward, prompts cut into chunks of that size."""
    rounds = typical_rounds(lengths, tokens, True, max(1, group.size), model.window, 64)
    batch = mean_batch(rounds)
    whole = memory(model, gpu, precision, "replica", group, tokens)
    return Point(
        tokens=tokens,
        dwdp=dwdp(model, gpu, precision, batch, group),
        dep=dep(model, gpu, precision, rounds, exchange),
        in_tree=dwdp(model, gpu, precision, batch, in_tree_group(group.size), "in-tree dwdp"),
        replica=replica(model, gpu, precision, batch) if whole.fits else None,
    )


def _crossover(points: tuple[Point, ...], holds: Callable[[Point], bool], at: Callable[[int], Point]) -> int | None:
    """Smallest token count (to 256 tokens) from which ``holds`` stays true over the sweep."""
    start = len(points)
    while start > 0 and holds(points[start - 1]):
        start -= 1
    if start == len(points):
        return None
    if start == 0:
        return points[0].tokens
    low, high = points[start - 1].tokens, points[start].tokens
    while high - low > FINE_CHUNK:
        middle = (low + high) // 2
        if holds(at(middle)):
            high = middle
        else:
            low = middle
    return high


def _recommended_chunk(
    model: ModelShape, gpu: Gpu, precision: Precision, group: Group, points: tuple[Point, ...]
) -> int:
    """Smallest chunk within 5 % of the best rate that leaves room for some KV cache."""
    fitting = [p for p in points if memory(model, gpu, precision, "dwdp", group, p.tokens).kv_cache >= MEMORY_FOR_KV]
    candidates = fitting or list(points[:1])
    best = max(p.dwdp.tokens_per_second for p in candidates)
    return next(p.tokens for p in candidates if p.dwdp.tokens_per_second >= 0.95 * best)


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:.1f}".rstrip("0").rstrip(".") + "k"


def verdict(plan: Plan) -> str:
    """One sentence: where DWDP pays, what to use elsewhere, and whether a replica is simpler."""
    name = f"DWDP{plan.group.size}"
    chosen = next(p for p in plan.points if p.tokens == plan.chunk)
    clauses = []
    if not plan.memories["dwdp"].fits:
        clauses.append(f"{name} does not fit: use a larger group")
    elif plan.crossover is None:
        best = max(plan.points, key=lambda p: p.speedup)
        clauses.append(
            f"{name} does not pay at up to {_thousands(plan.points[-1].tokens)} tokens per rank "
            f"(at best {best.speedup:.2f}x of DEP): use DEP"
        )
    else:
        gain = chosen.speedup - 1
        if plan.crossover <= plan.points[0].tokens:
            clauses.append(f"{name} pays at any prefill size ({gain:+.0%} over DEP at {_thousands(plan.chunk)})")
        else:
            clauses.append(
                f"{name} pays above {_thousands(plan.crossover)} tokens per rank "
                f"({gain:+.0%} over DEP at {_thousands(plan.chunk)}); use DEP below"
            )
        if abs(gain) < TIE:
            clauses.append("the difference is within the model's error")
    if plan.memories["replica"].fits:
        freed = plan.memories["dwdp"].kv_cache - plan.memories["replica"].kv_cache
        tail = f" unless the {freed / 1e9:.0f} GB that {name} frees for the KV cache matter" if freed > 0 else ""
        clauses.append(f"a replica fits one GPU: prefer replicas{tail}")
    return "; ".join(clauses) + "."


def _flags(group: Group, local_experts: int, gpus: int, chunk: int, direct_tokens: int) -> tuple[str, ...]:
    return (
        "--enable-dwdp",
        f"--tp-size {gpus}",
        *([f"--dwdp-group-size {group.size}"] if gpus > group.size else []),
        f"--chunked-prefill-size {chunk}",
        *([f"--max-prefill-tokens {chunk}"] if chunk > MAX_PREFILL_TOKENS else []),
        f"--dwdp-local-experts {local_experts}",
        f"--dwdp-depth {group.depth}",
        f"--dwdp-direct-max-tokens {direct_tokens}",
    )


def make_plan(
    model: ModelShape,
    gpu: Gpu,
    precision: Precision,
    group: Group,
    lengths: Lengths,
    exchange: str = "all-gather",
    gpus: int = 0,
) -> Plan:
    """Sweep tokens per rank, find the crossover, choose settings.

    Args:
        gpus: of the node, a multiple of the group's size; 0 for one group.

    Raises:
        PlannerError: if the group is larger than the GPU's link domain, or no scheme fits.
    """
    if group.size > gpu.max_group:
        raise PlannerError(
            f"{gpu.name} links {gpu.max_group} GPUs; a group of {group.size} would leave the domain. "
            f"Use --group-size {gpu.max_group} or less."
        )
    if group.size < 2:
        raise PlannerError("a plan compares ways to share experts, so it needs at least 2 GPUs in a group")

    def at(tokens: int) -> Point:
        return evaluate(model, gpu, precision, group, lengths, tokens, exchange)

    points = tuple(at(tokens) for tokens in SWEEP)
    crossover = _crossover(points, lambda p: p.speedup >= 1.0, at)
    hidden = _crossover(points, lambda p: p.dwdp.parts.exposed_copy <= 0.01 * p.dwdp.compute, at)
    direct_tokens = direct_max_tokens(
        model,
        gpu,
        group.size,
        weight_format=precision.experts.name,
        local_experts=group.local_experts,
        depth=group.depth,
    )
    chunk = _recommended_chunk(model, gpu, precision, group, points)
    schemes = ("replica", "dep", "dwdp", "in-tree dwdp")
    sharing = {name: in_tree_group(group.size) if name == "in-tree dwdp" else group for name in schemes}
    memories = {name: memory(model, gpu, precision, name, sharing[name], chunk) for name in schemes}
    if not any(m.fits for m in memories.values()):
        raise PlannerError(
            f"{model.name} in {precision.experts.name} fits {group.size} x {gpu.name} under no scheme; "
            "use a larger group or a smaller weight format"
        )
    plan = Plan(
        model=model,
        gpu=gpu,
        precision=precision,
        group=group,
        lengths=lengths,
        points=points,
        crossover=crossover,
        hidden_from=hidden,
        chunk=chunk,
        direct_tokens=direct_tokens,
        memories=memories,
        verdict="",
        flags=_flags(group, group.stored(model), gpus or group.size, chunk, direct_tokens),
    )
    return replace(plan, verdict=verdict(plan))
