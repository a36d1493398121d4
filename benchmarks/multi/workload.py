"""Part c's requests: the same number of prompts for every rank, of lengths that are drawn once (pure)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sglang_dwdp.planner.workload import Lengths

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Prefill:
    """One workload.

    length: of the longest prompt, in tokens.  variation: prompts are uniform over [(1 - variation) length, length],
    so that each fits the same chunk.  prompts: of every rank, which prefills them one in each forward.
    """

    length: int
    variation: float
    prompts: int

    @property
    def lengths(self) -> Lengths:
        """As the planner has them."""
        kind = "uniform" if self.variation else "fixed"
        return Lengths(kind, self.length, ratio=1 - self.variation)

    def drawn(self, ranks: int) -> list[list[int]]:
        """`[ranks][prompts]`, the same at every call."""
        rng = np.random.default_rng(zlib.crc32(f"{self}".encode()))
        return [[int(length) for length in self.lengths.sample(self.prompts, rng)] for _ in range(ranks)]


@dataclass(frozen=True, slots=True)
class Load:
    """All requests of a comparison.

    chunk: tokens of a rank's forward at most.  decodes: sequences of every rank.  steps: tokens that each gets.
    compared: lengths of prompts whose tokens are compared, `compared_tokens` new ones each.
    """

    prefills: tuple[Prefill, ...]
    decodes: tuple[int, ...]
    steps: int
    repeats: int
    warm_up: int
    compared: tuple[int, ...]
    compared_tokens: int
    chunk: int

    @property
    def cached_tokens(self) -> int:
        """What a rank's KV cache must hold.

        Three of the longest prompts, since one is scheduled while another runs and a third ends, or all sequences of
        the largest decode.
        """
        longest = max(prefill.length for prefill in self.prefills)
        return max(3 * longest + 2048, max(self.decodes) * (DECODE_PROMPT + self.steps + 64) + 1024)


DECODE_PROMPT = 16  # tokens of a prompt whose decoding is measured
VARIATIONS = (0.0, 0.2)


def _prefills(sizes: Mapping[int, int]) -> tuple[Prefill, ...]:
    return tuple(Prefill(length, variation, count) for length, count in sizes.items() for variation in VARIATIONS)


GPU_LOAD = Load(
    prefills=_prefills({1024: 16, 4096: 8, 8192: 6, 16384: 4}),
    decodes=(1, 8, 32),
    steps=64,
    repeats=3,
    warm_up=1,
    compared=(1, 7, 33, 130, 300, 513, 1025, 4097),
    compared_tokens=16,
    chunk=16384,
)
CPU_LOAD = Load(  # that the code works; its figures mean nothing
    prefills=_prefills({32: 2, 96: 2}),
    decodes=(1, 3),
    steps=4,
    repeats=1,
    warm_up=1,
    compared=(1, 40, 150),
    compared_tokens=6,
    chunk=256,
)


class Draws:
    """Prompts of random tokens, never the same twice."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = random.Random(seed)

    def prompt(self, length: int) -> list[int]:
        """Above the special tokens, below the smallest vocabulary."""
        return [self._draw.randrange(10, 2000) for _ in range(length)]

    def for_ranks(self, lengths: list[list[int]]) -> dict[int, Prompts]:
        """By rank, prompts of `lengths[rank]`."""
        return {rank: [self.prompt(length) for length in mine] for rank, mine in enumerate(lengths)}
