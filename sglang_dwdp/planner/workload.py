"""Sequence lengths, and the batches that a scheduler packs from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as validated_dataclass

from sglang_dwdp.planner.checks import STRICT, Count, checked

FEWEST_PROMPTS = 4  # that typical forwards of one rank come from
LONGEST = 10_000_000  # tokens of a prompt; no model reads more


@checked
@validated_dataclass(frozen=True, config=STRICT)
class Lengths:
    """A distribution of prompt lengths in tokens.

    Attributes:
        kind: `fixed`; `uniform` over [ratio * length, length] (the "ratio" of the DWDP paper and of InferenceX);
            `normal` with mean `length` and deviation `std`; `lognormal` likewise.
        limit: longest prompt that is accepted; longer draws are cut to it. 0: no limit.
    """

    kind: Annotated[str, Field(pattern="^(fixed|uniform|normal|lognormal)$")] = "fixed"
    length: Annotated[int, Field(ge=1, le=LONGEST)] = 8192
    ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    std: Annotated[float, Field(ge=0, le=LONGEST)] = 0.0
    limit: Count = 0

    def sample(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`count` lengths, shape [count], in tokens."""
        if self.kind == "uniform":
            low = max(1, round(self.ratio * self.length))
            drawn = rng.integers(low, self.length + 1, count).astype(float)
        elif self.kind == "normal":
            drawn = rng.normal(self.length, self.std, count)
        elif self.kind == "lognormal":
            variance = np.log1p((self.std / self.length) ** 2)
            drawn = rng.lognormal(np.log(self.length) - variance / 2, np.sqrt(variance), count)
        else:
            drawn = np.full(count, float(self.length))
        drawn_lengths: NDArray[np.int64] = np.clip(np.rint(drawn), 1, self.limit or LONGEST).astype(np.int64)
        return drawn_lengths


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward on one rank.

    Attributes:
        tokens: new tokens.
        pairs: (query, key) pairs of full causal attention, over all sequences.
        window_pairs: pairs under the sliding window, where the model has one.
    """

    tokens: float
    pairs: float
    window_pairs: float = 0.0


def causal_pairs(new: int, prefix: int = 0) -> float:
    """Pairs of `new` queries behind `prefix` cached tokens: each sees the past and itself."""
    return new * prefix + new * (new + 1) / 2


def windowed_pairs(new: int, prefix: int, window: int) -> float:
    """As `causal_pairs` when a query sees at most `window` keys."""
    if window <= 0:
        return causal_pairs(new, prefix)
    ramp = max(0, min(new, window - prefix))
    return causal_pairs(ramp, prefix) + (new - ramp) * window


def batch_of(pieces: Iterable[tuple[int, int]], window: int = 0) -> Batch:
    """A batch from (new tokens, cached prefix) pieces."""
    items = list(pieces)
    return Batch(
        tokens=float(sum(new for new, _ in items)),
        pairs=sum(causal_pairs(new, prefix) for new, prefix in items),
        window_pairs=sum(windowed_pairs(new, prefix, window) for new, prefix in items),
    )


@dataclass
class Prompt:
    """A prompt on its way: tokens, and simulated seconds."""

    length: int
    done: int = 0
    arrival: float = 0.0
    finished: float = 0.0


def take(
    queue: deque[Prompt], budget: int, chunked: bool, window: int = 0, max_prefill: int = 0
) -> tuple[Batch, list[Prompt]]:
    """A forward of at most `budget` tokens from a queue, first come, first served: (its batch, prompts it completes).

    Args:
        chunked: a prompt that does not fit is cut (SGLang's chunked prefill); otherwise it waits for the next forward,
            and one longer than the budget has a forward of its own.
        max_prefill: no further prompt joins a forward of so many tokens; 0 for no such limit.
    """
    room = budget
    pieces: list[tuple[int, int]] = []
    finished: list[Prompt] = []
    while queue and room > 0 and not (max_prefill and budget - room >= max_prefill):
        prompt = queue[0]
        rest = prompt.length - prompt.done
        if not chunked and pieces and rest > room:
            break
        new = min(rest, room) if chunked else rest
        pieces.append((new, prompt.done))
        prompt.done += new
        room -= new
        if prompt.done == prompt.length:
            finished.append(queue.popleft())
    return batch_of(pieces, window), finished


def pack(lengths: Iterable[int], budget: int, chunked: bool, window: int = 0) -> list[Batch]:
    """All forwards of a queue; see `take`."""
    queue, batches = deque(map(Prompt, lengths)), []
    while queue:
        batches.append(take(queue, budget, chunked, window)[0])
    return batches


@cache
def typical_rounds(
    lengths: Lengths, budget: int, chunked: bool, ranks: int, window: int = 0, rounds: int = 400
) -> tuple[tuple[Batch, ...], ...]:
    """Forwards of saturated ranks, `[rounds][ranks]`; each rank packs its own queue (fixed seed).

    Prompts of many chunks are sampled over their whole length: the first `rounds` forwards would only see their
    beginnings, whose attention is cheap.
    """
    rng = np.random.default_rng(20260402)
    few_prompts = chunked and lengths.length > budget * rounds // FEWEST_PROMPTS
    per_rank: list[list[Batch]] = []
    for _ in range(ranks):
        batches: list[Batch] = []
        while len(batches) < rounds:
            need = int((rounds - len(batches) + 2) * (budget / lengths.length + 1)) + 1
            drawn = lengths.sample(FEWEST_PROMPTS if few_prompts else need, rng).tolist()
            # the last forward is cut off by the end of the sample
            batches += pack(drawn, budget, chunked, window)[:-1]
        step = len(batches) / rounds if few_prompts else 1
        per_rank.append([batches[int(i * step)] for i in range(rounds)])
    return tuple(tuple(rank[i] for rank in per_rank) for i in range(rounds))


def mean_batch(rounds: Iterable[Iterable[Batch]]) -> Batch:
    """The average forward."""
    flat = [(b.tokens, b.pairs, b.window_pairs) for ranks in rounds for b in ranks]
    return Batch(*(sum(values) / len(flat) for values in zip(*flat, strict=True)))
