"""What to set: where DWDP begins to pay, the chunk, the experts that a rank keeps, the slots."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from .compare import Case, Point, evaluate
from .cost import Group
from .memory import memory

MEMORY_FOR_KV = 4e9
FINE_CHUNK = 256
# Two slots are the fewest that let a copy run under the experts of the layer before it.
DEPTHS = (2, 3, 4)
# A difference below this is not worth memory.
WORTH = 0.01


def crossover(points: Sequence[Point], holds: Callable[[Point], bool], at: Callable[[int], Point]) -> int | None:
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


def leaves_room(case: Case, group: Group, tokens: int) -> bool:
    """Whether DWDP leaves ``MEMORY_FOR_KV`` bytes for the KV cache."""
    return memory(case.model, case.gpu, case.precision, "dwdp", group, tokens).kv_cache >= MEMORY_FOR_KV


def chunk_size(case: Case, group: Group, points: Sequence[Point]) -> int:
    """Smallest chunk within 5 % of the best rate that leaves room for some KV cache."""
    fitting = [p for p in points if leaves_room(case, group, p.tokens)]
    candidates = fitting or list(points[:1])
    best = max(p.dwdp.tokens_per_second for p in candidates)
    return next(p.tokens for p in candidates if p.dwdp.tokens_per_second >= 0.95 * best)


def local_experts(case: Case, group: Group, tokens: int) -> int:
    """Fewest experts per rank whose copies ``tokens`` tokens hide; 0, equal shares, where memory does not allow it."""
    share = replace(group, local_experts=0).stored(case.model)

    def hidden(count: int) -> bool:
        return evaluate(case, replace(group, local_experts=count), tokens).hidden

    counts = range(share, case.model.experts + 1)
    count = counts[bisect_left(counts, True, key=hidden)]  # with all experts at home there is nothing to hide
    return count if count > share and leaves_room(case, replace(group, local_experts=count), tokens) else 0


def depth(case: Case, group: Group, tokens: int) -> int:
    """Fewest slots within ``WORTH`` of the best time among those that fit."""
    fitting = [n for n in DEPTHS if leaves_room(case, replace(group, depth=n), tokens)] or [DEPTHS[0]]
    times = {n: evaluate(case, replace(group, depth=n), tokens).dwdp.seconds for n in fitting}
    return next(n for n in fitting if times[n] <= min(times.values()) * (1 + WORTH))
