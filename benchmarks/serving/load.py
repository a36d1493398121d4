"""The requests of a run: options of SGLang's benchmark where it can draw them, else a file that it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from benchmarks.serving.scenario import Bursty, Load


def dataset_options(load: Load, file: Path | None) -> list[str]:
    """The options of SGLang's benchmark that say what is sent; `file` has been written by `write_bursty`."""
    if file is not None:
        return ["--backend", "sglang-oai-chat", "--dataset-name", "openai", "--dataset-path", str(file)]
    return [
        *("--backend", "sglang", "--dataset-name", "random-ids", "--tokenize-prompt"),
        *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
        *("--random-range-ratio", f"{load.ratio:g}"),
    ]


def bursty_lengths(bursty: Bursty, requests: int, ranks: int, seed: int) -> list[int]:
    """Tokens of each request's prompt, in the order of sending."""
    rng = np.random.default_rng(seed)
    variance = np.log(1 + (bursty.std / bursty.mean) ** 2)
    drawn = rng.lognormal(np.log(bursty.mean) - variance / 2, np.sqrt(variance), requests)
    return long_to_one_rank([int(length) for length in np.clip(drawn, 1, bursty.limit)], ranks, rng)


def long_to_one_rank(lengths: Sequence[int], ranks: int, rng: np.random.Generator) -> list[int]:
    """The same lengths in an order in which places 0, ranks, 2 ranks, … have the longest, all else at random."""
    ranked = np.array(sorted(lengths, reverse=True))
    places = len(range(0, len(ranked), ranks))
    longest, others = (rng.permutation(part).tolist() for part in (ranked[:places], ranked[places:]))
    return [(longest if place % ranks == 0 else others).pop() for place in range(len(ranked))]


def write_bursty(load: Load, ranks: int, tokenizer: Any, path: Path) -> None:
    """Write a dataset `openai` of SGLang's benchmark: text that encodes to about the drawn lengths.

    Args:
        load: With `bursty`.
        ranks: Of a server.
        tokenizer: The model's, of transformers.
        path: The file.
    """
    assert load.bursty is not None
    text = tokenizer.encode(" ".join(" ".join(topics[name].split()) for name in sorted(topics)))
    rng = np.random.default_rng(load.seed + 1)
    lines = []
    for length in bursty_lengths(load.bursty, load.requests, ranks, load.seed):
        start = int(rng.integers(0, len(text)))
        tokens = [text[(start + i) % len(text)] for i in range(length)]
        message = {"role": "user", "content": tokenizer.decode(tokens)}
        lines.append(json.dumps({"messages": [message], "max_tokens": load.output_tokens}))
    path.write_text("\n".join(lines) + "\n")


def checked_prompts(load: Load) -> list[list[int]]:
    """Token ids of four prompts whose answers are compared, the same for every variant."""
    rng = np.random.default_rng(load.seed + 2)
    longest = load.bursty.mean if load.bursty else load.input_tokens
    return [rng.integers(10, 2000, max(1, longest * quarters // 4)).tolist() for quarters in range(1, 5)]
