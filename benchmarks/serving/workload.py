"""The requests of a run: options of SGLang's benchmark where it can draw them, else a file that it reads.

SGLang's benchmark draws uniform lengths itself (`random-ids`, exact, as token ids). Other distributions, and an
order of long and short requests, are written as a file of chat messages, which the benchmark sends in its order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from benchmarks.serving.scenario import Load, Point

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


def needs_file(load: Load) -> bool:
    """Whether SGLang's benchmark cannot draw these requests itself."""
    return load.order != "drawn" or load.lengths.kind not in ("fixed", "uniform") or load.lengths.limit > 0


def dataset_options(load: Load, file: Path | None) -> list[str]:
    """The options of SGLang's benchmark that say what is sent."""
    if file is not None:
        return ["--backend", "sglang-oai-chat", "--dataset-name", "openai", "--dataset-path", str(file)]
    ratio = load.lengths.ratio if load.lengths.kind == "uniform" else 1.0
    return [
        *("--backend", "sglang", "--dataset-name", "random-ids", "--tokenize-prompt"),
        *("--random-input-len", str(load.lengths.length), "--random-output-len", str(load.output_tokens)),
        *("--random-range-ratio", f"{ratio:g}"),
    ]


def point_options(point: Point) -> list[str]:
    """The options of SGLang's benchmark that say how fast requests are sent."""
    if point.kind == "rate":
        return ["--request-rate", f"{point.value:g}"]
    return ["--request-rate", "inf", "--max-concurrency", f"{point.value:g}"]


def prompt_lengths(load: Load, ranks: int) -> list[int]:
    """Tokens of each request's prompt, in the order of sending."""
    rng = np.random.default_rng(load.seed)
    drawn = [int(length) for length in load.lengths.sample(load.requests, rng)]
    return long_to_one_rank(drawn, ranks, rng) if load.order == "long_to_one_rank" else drawn


def long_to_one_rank(lengths: Sequence[int], ranks: int, rng: np.random.Generator) -> list[int]:
    """The same lengths in an order in which places 0, ranks, 2 ranks, … have the longest, all else at random."""
    ranked = sorted(lengths, reverse=True)
    places = range(0, len(ranked), ranks)
    longest = [int(length) for length in rng.permutation(np.array(ranked[: len(places)], dtype=np.int64))]
    others = [int(length) for length in rng.permutation(np.array(ranked[len(places) :], dtype=np.int64))]
    return [longest.pop() if place % ranks == 0 else others.pop() for place in range(len(ranked))]


def write_file(load: Load, ranks: int, encode: Encode, decode: Decode, path: Path) -> None:
    """Write a dataset `openai` of SGLang's benchmark: text that encodes to (about) the drawn lengths."""
    text = encode(" ".join(" ".join(topics[name].split()) for name in sorted(topics)))
    rng = np.random.default_rng(load.seed + 1)
    lines = []
    for length in prompt_lengths(load, ranks):
        start = int(rng.integers(0, len(text)))
        tokens = [text[(start + i) % len(text)] for i in range(length)]
        message = {"role": "user", "content": decode(tokens)}
        lines.append(json.dumps({"messages": [message], "max_tokens": load.output_tokens}))
    path.write_text("\n".join(lines) + "\n")


def sampled_prompts(load: Load, count: int, vocabulary: int) -> list[list[int]]:
    """Prompts of the token check, as token ids: lengths of this load, the same for every variant."""
    rng = np.random.default_rng(load.seed + 2)
    low, high = min(10, vocabulary - 1), min(vocabulary, 4096)
    return [[int(t) for t in rng.integers(low, high, int(n))] for n in load.lengths.sample(count, rng)]
