"""The requests: options where SGLang draws them, a file where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving import queues, workload
from benchmarks.serving.scenario import Load, Point
from sglang_dwdp.planner.workload import Lengths

LOGNORMAL = Lengths("lognormal", 200, std=300, limit=1000)


def load(lengths: Lengths, order: str = "drawn", requests: int = 40) -> Load:
    return Load(lengths=lengths, output_tokens=8, requests=requests, rates=(1.0,), order=order)


def test_sglang_draws_uniform_lengths() -> None:
    uniform = load(Lengths("uniform", 8192, 0.8))
    assert not workload.needs_file(uniform)
    options = workload.dataset_options(uniform, None)
    assert options[options.index("--random-range-ratio") + 1] == "0.8"
    assert "--tokenize-prompt" in options  # exact lengths
    fixed = workload.dataset_options(load(Lengths("fixed", 100)), None)
    assert fixed[fixed.index("--random-range-ratio") + 1] == "1"
    assert workload.needs_file(load(LOGNORMAL))
    assert workload.needs_file(load(Lengths("fixed", 100), "long_to_one_rank"))


def test_points() -> None:
    assert workload.point_options(Point("rate", 2.5)) == ["--request-rate", "2.5"]
    assert workload.point_options(Point("rate", float("inf"))) == ["--request-rate", "inf"]
    assert workload.point_options(Point("concurrency", 64)) == ["--request-rate", "inf", "--max-concurrency", "64"]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.integers(1, 8))
def test_by_count_one_rank_gets_all_long_requests(lengths: list[int], ranks: int) -> None:
    ordered = workload.long_to_one_rank(lengths, ranks, np.random.default_rng(0))
    assert sorted(ordered) == sorted(lengths)
    first = ordered[::ranks]
    others = [length for place, length in enumerate(ordered) if place % ranks]
    assert not others or min(first) >= max(others)


def test_a_file_holds_what_was_drawn(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    drawn = load(LOGNORMAL, "long_to_one_rank")

    def encode(text: str) -> list[int]:
        return list(text.encode("latin-1", "replace"))

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode("latin-1")

    workload.write_file(drawn, 2, encode, decode, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lengths = [len(row["messages"][0]["content"]) for row in rows]
    assert lengths == workload.prompt_lengths(drawn, 2)
    assert sum(lengths[::2]) > 3 * sum(lengths[1::2])
    assert {row["max_tokens"] for row in rows} == {8}
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    again = tmp_path / "again.jsonl"
    workload.write_file(drawn, 2, encode, decode, again)
    assert again.read_text() == path.read_text()


def test_queues_without_the_benchmarks_own_start() -> None:
    idle = {"waiting": [0, 0], "running": [0, 0]}
    samples = [{"seconds": float(s), **idle} for s in range(10)] + [
        {"seconds": 10.0, "waiting": [2, 0], "running": [1, 1]},
        {"seconds": 10.25, **idle},
        {"seconds": 30.0, **idle},
    ]
    kept = queues.trim(samples)
    assert [sample["seconds"] for sample in kept] == [0.5, 0.75]
    busy = [{"seconds": float(s), "waiting": [1, 0], "running": [0, 0]} for s in range(5000)]
    assert len(queues.trim(busy)) == 5000 // 3 + 1
    assert queues.depths(kept) == [[3, 0], [1, 0]]
    assert queues.trim(samples[:5]) == queues.depths([]) == []
    assert queues.sparkline([0, 3, 1, 0], 3, width=2) == "█▃"
    loaded = [{**sample, "pending_tokens": [0, 4000 * (place == 1)]} for place, sample in enumerate(kept)]
    assert queues.lines_of(loaded)[2:] == [
        "  waiting tokens on rank 0 over time, at most      0:   ",
        "  waiting tokens on rank 1 over time, at most  4,000:  █",
    ]
    assert queues.sparkline([0, 0], 0) == ""


def test_sampled_prompts_are_the_same_for_everybody() -> None:
    prompts = workload.sampled_prompts(load(LOGNORMAL), 5, 2048)
    assert prompts == workload.sampled_prompts(load(LOGNORMAL), 5, 2048)
    assert len({len(prompt) for prompt in prompts}) > 1
    assert all(0 <= token < 2048 for prompt in prompts for token in prompt)
