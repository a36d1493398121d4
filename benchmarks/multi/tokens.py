"""Whether variants generate the same tokens, and where they do not, whether rounding can be the cause (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engines import Answer

TIE = 2.0  # times the largest difference of log-probabilities seen where the tokens are equal


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compare(answers: Mapping[int, Sequence[Answer]], expected: Sequence[Answer]) -> dict[str, Any]:
    """One variant's answers, on every rank, against the reference's.

    answers: `[prompts]` by rank.  expected: `[prompts]`.

    Returns `answers`, `same_tokens` and `same_logprobs` (bitwise); `largest_difference`, of log-probabilities of equal
    tokens before the first different one; of the answers with other tokens, `ties`: there the variant took the
    reference's second best token, whose log-probability was so little below the best one's that differences as large
    as those seen elsewhere reverse the two.
    """
    pairs = [pair for mine in answers.values() for pair in zip(mine, expected, strict=True)]
    largest = 0.0
    for got, right in pairs:
        same = common_prefix(got.tokens, right.tokens)
        gaps = (abs(a - b) for a, b in zip(got.logprobs[:same], right.logprobs[:same], strict=True))
        largest = max(largest, *gaps, 0.0)
    different = [(got, right) for got, right in pairs if got.tokens != right.tokens]
    return {
        "answers": len(pairs),
        "same_tokens": len(pairs) - len(different),
        "same_logprobs": sum(got.tokens == right.tokens and got.logprobs == right.logprobs for got, right in pairs),
        "largest_difference": largest,
        "ties": sum(_is_tie(got, right, TIE * largest) for got, right in different),
        "first_differences": [_first_difference(got, right) for got, right in different],
    }


def _gap(got: Answer, right: Answer, at: int) -> float | None:
    """By how much the reference preferred its token; None where the variant's is not its second best."""
    if at >= len(right.top) or at >= len(got.tokens):
        return None
    scores = {token: score for score, token in right.top[at]}
    mine, best = scores.get(got.tokens[at]), scores.get(right.tokens[at])
    return None if mine is None or best is None else best - mine


def _is_tie(got: Answer, right: Answer, limit: float) -> bool:
    gap = _gap(got, right, common_prefix(got.tokens, right.tokens))
    return gap is not None and gap <= limit


def _first_difference(got: Answer, right: Answer) -> dict[str, Any]:
    at = common_prefix(got.tokens, right.tokens)
    return {"position": at, "gap": _gap(got, right, at)}


def share_same(compared: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The least share of answers with the reference's tokens, among the variants; None without any."""
    shares = [row["same_tokens"] / row["answers"] for row in compared.values() if row.get("answers")]
    return min(shares) if shares else None
