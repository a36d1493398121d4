"""Whether servers generate the same tokens: sampled requests, greedy, each on every rank of an idle server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import requests

from benchmarks.serving.deployment import Deployment
from benchmarks.serving.errors import RunError

Tokens = list[list[list[int]]]  # [ranks][prompts][new_tokens]


def generate(
    deployment: Deployment, prompts: Sequence[list[int]], new_tokens: int, timeout_s: float, at_once: int = 1
) -> Tokens:
    """Every prompt on every rank (through a router: once, on the rank that it is given), `at_once` of them on each.

    Raises:
        RunError: a server ended, answered with an error, or took longer than `timeout_s` seconds for one request.
    """
    ranks: list[int | None] = [None] if deployment.routed or deployment.ranks == 1 else list(range(deployment.ranks))

    def one_rank(rank: int | None) -> list[list[int]]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda prompt: _one(deployment, prompt, new_tokens, rank, timeout_s), prompts))

    # All ranks at once: they share nothing but, with DWDP, the experts.
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one_rank, ranks))


def warm_up(deployment: Deployment, longest: int, chunk_tokens: int, vocabulary: int, timeout_s: float) -> None:
    """Prompts of 1, 2, 4, … `longest` tokens on every rank, one by one and then together, with more of the longest.

    Kernels are compiled when a forward of their size first comes, which is no part of what is compared. Together they
    wait for each other, so that forwards of a whole chunk come too, and the rest of a prompt that did not fit in.

    chunk_tokens: the chunked prefill size of a rank; 0: unknown.

    Raises:
        RunError: as in `generate`.
    """
    rng = np.random.default_rng(longest)
    lengths = [1 << power for power in range(longest.bit_length())] + [longest]
    together = lengths + [longest] * (2 * chunk_tokens // longest + 1)
    for chosen, new_tokens, at_once in ((lengths, 4, 1), (together, 16, len(together))):
        prompts = [[int(t) for t in rng.integers(min(10, vocabulary - 1), vocabulary, n)] for n in chosen]
        generate(deployment, prompts, new_tokens, timeout_s, at_once)


def _one(deployment: Deployment, prompt: list[int], new_tokens: int, rank: int | None, timeout_s: float) -> list[int]:
    body: dict[str, Any] = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
    }
    if rank is not None:
        body["routed_dp_rank"] = rank
    try:
        answer = requests.post(f"{deployment.url}/generate", json=body, timeout=timeout_s)
        answer.raise_for_status()
        tokens: list[int] = answer.json()["output_ids"]
    except (requests.RequestException, ValueError, KeyError) as error:
        deployment.check_alive()
        what = f"a request of {len(prompt)} tokens before the runs failed"
        raise RunError(f"{what}: {error}{deployment.trouble()}") from None
    return tokens


def share_equal(tokens: Tokens, reference: Tokens) -> float:
    """Share of sampled requests, on all ranks, that got the tokens of the reference's first rank; NaN of none."""
    pairs = [(mine, right) for rank in tokens for mine, right in zip(rank, reference[0], strict=True)]
    return sum(mine == right for mine, right in pairs) / len(pairs) if pairs else float("nan")


def share_same_text(hashes: Sequence[str], reference: Sequence[str]) -> float:
    """Share of a benchmark's answers with the reference's text, under load and so in other batches."""
    if not reference or len(hashes) != len(reference):
        return float("nan")
    return sum(a == b for a, b in zip(hashes, reference, strict=True)) / len(reference)
