"""What engines are measured with: cases as the command line names them, their prompts, and their rates (pure)."""

from __future__ import annotations

import random
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.engine import Prompts, Timeline

DECODE_PROMPT = 128  # tokens of a prompt whose decoding is measured
DECODE_TOKENS = 256  # new tokens of each
PARITY_PROMPTS, PARITY_TOKENS, PARITY_LONGEST = 64, 8, 16384


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement.

    Attributes:
        kind: `prefill`: one prompt in each forward, one new token. `decode`: many new tokens.
        size: Tokens of a prompt, or sequences of a rank.
        variation: Of prefills: lengths are uniform over size x (1 ± variation).
        busy: Of decodes: ranks that have sequences, the others are idle; 0 for all.
    """

    kind: Literal["prefill", "decode"]
    size: int
    variation: float = 0.0
    busy: int = 0

    @property
    def name(self) -> str:
        """As the command line has it."""
        more = f"{self.variation * 100:g}" if self.variation else f"{self.busy}" if self.busy else ""
        return f"{self.kind}:{self.size}" + (f":{more}" if more else "")

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return round(self.size * (1 + self.variation)) if self.kind == "prefill" else DECODE_PROMPT

    def lengths(self, ranks: int, prompts: int) -> list[list[int]]:
        """`[ranks][prompts]` lengths in tokens, the same at every call.

        Args:
            ranks: That get prompts.
            prompts: Of a rank; a decode has its own number.
        """
        if self.kind == "decode":
            return [[DECODE_PROMPT] * self.size if rank < (self.busy or ranks) else [] for rank in range(ranks)]
        draw = random.Random(zlib.crc32(self.name.encode()))
        low = round(self.size * (1 - self.variation))
        return [[draw.randint(low, self.longest) for _ in range(prompts)] for _ in range(ranks)]


def parse_case(text: str) -> Case:
    """A case from `prefill:TOKENS[:PERCENT]` or `decode:SEQUENCES[:RANKS]`.

    Raises:
        ValueError: It is none of these.
    """
    kind, *numbers = text.split(":")
    try:
        values = [int(number) for number in numbers]
        if kind == "decode" and len(values) in (1, 2) and min(values) > 0:
            return Case("decode", values[0], busy=sum(values[1:]))
        if kind == "prefill" and len(values) in (1, 2) and values[0] > 0 and 0 <= sum(values[1:]) < 100:
            return Case("prefill", values[0], sum(values[1:]) / 100)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is no case: prefill:TOKENS[:PERCENT] or decode:SEQUENCES[:RANKS]")


class Draws:
    """Prompts of random tokens, never the same twice."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = random.Random(seed)

    def prompt(self, length: int) -> list[int]:
        """Token ids above the special ones and below the smallest vocabulary."""
        return self._draw.choices(range(10, 2000), k=length)

    def by_rank(self, lengths: Sequence[Sequence[int]]) -> dict[int, Prompts]:
        """By rank, prompts of `lengths[rank]`."""
        return {rank: [self.prompt(length) for length in row] for rank, row in enumerate(lengths)}


def parity_prompts(longest: int) -> Prompts:
    """Prompts of 1 to `longest` tokens, evenly spread over the logarithm, the same at every call."""
    draws = Draws(17)
    return [draws.prompt(round(longest ** (index / (PARITY_PROMPTS - 1)))) for index in range(PARITY_PROMPTS)]


def graph_size(tokens: int) -> int:
    """The smallest of SGLang's default sizes of prefill graphs that takes `tokens` tokens.

    Their steps: `sglang.srt.arg_groups.cuda_graph_hook.generate_prefill_cuda_graph_batch_sizes`.
    """
    for last, step in ((32, 4), (256, 16), (512, 32), (1024, 64), (4096, 256)):
        if tokens <= last:
            return max(4, -(-tokens // step) * step)
    return -(-tokens // 512) * 512


def graph_sizes(cases: Iterable[Case], ranks: int, prompts: int) -> list[int]:
    """Sizes of prefill graphs that the cases use, so that no others are captured."""
    drawn = (length for case in cases for row in case.lengths(ranks, prompts) for length in row)
    return sorted({graph_size(length) for length in drawn})


def decode_rate(timelines: Sequence[Timeline]) -> float:
    """Tokens per second of all sequences, while all of them decode.

    Args:
        timelines: For each sequence, (seconds, tokens so far) at each arrival.

    Raises:
        ValueError: There is no such time: a sequence ended before another began.
    """
    start = max(timeline[0][0] for timeline in timelines)
    end = min(timeline[-1][0] for timeline in timelines)
    if end <= start:
        raise ValueError("the sequences never decoded together: more new tokens are needed")
    return sum(_count(timeline, end) - _count(timeline, start) for timeline in timelines) / (end - start)


def _count(timeline: Timeline, at: float) -> int:
    index = bisect_right(timeline, at, key=lambda entry: entry[0])
    return timeline[index - 1][1] if index else 0


def same_answers(
    answers: Mapping[int, Sequence[Sequence[object]]], expected: Sequence[Sequence[object]]
) -> dict[str, int]:
    """How many answers are those of a reference.

    Args:
        answers: By rank, for each prompt an `engine.Answer`.
        expected: The reference's, for each prompt.

    Returns:
        `answers`, `same_tokens`, and `bitwise`: with the same log-probabilities too.
    """
    pairs = [pair for row in answers.values() for pair in zip(row, expected, strict=True)]
    tokens = [got[0] == right[0] for got, right in pairs]
    bitwise = [same and got[1] == right[1] for same, (got, right) in zip(tokens, pairs, strict=True)]
    return {"answers": len(pairs), "same_tokens": sum(tokens), "bitwise": sum(bitwise)}
