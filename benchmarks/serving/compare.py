"""A comparison from start to end: each variant served in turn, checked, run at every load point, and stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import client, tokens, workload
from benchmarks.serving.deployment import Deployment, serve
from benchmarks.serving.errors import RunError
from benchmarks.serving.models import vocabulary_size
from benchmarks.serving.progress import Display
from benchmarks.serving.queues import depths, sparkline
from benchmarks.serving.results import Results
from benchmarks.serving.scenario import Point, Scenario, Variant


class Deadline:
    """After `seconds` (0: never) nothing new is begun; what is missing then is left for the next call."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else float("inf")

    @property
    def passed(self) -> bool:
        """Whether it is too late to begin anything."""
        return time.monotonic() > self._end


def compare(
    scenario: Scenario,
    variants: Sequence[Variant],
    model: str,
    results: Results,
    display: Display,
    deadline: Deadline,
) -> None:
    """Run what is missing of `variants`. One that fails is recorded with its error, and the others go on.

    Raises:
        ScenarioError: the scenario's port is busy.
    """
    file = _dataset(scenario, variants, model, results.folder)
    for variant in variants:
        missing = len(results.missing(variant))
        display.advance(len(scenario.load.points()) - missing)
        if results.complete(variant):
            display.say(f"{variant.name}: kept from an earlier call")
            continue
        if deadline.passed:
            display.say(f"{variant.name}: left for the next call (--time-limit)")
            continue
        results.forget_error(variant)
        display.lap()
        try:
            _run_variant(scenario, variant, model, file, results, display, deadline)
        except RunError as error:
            results.write(variant, "error", {"error": str(error)})
            display.say(f"{variant.name}: failed: {error}")
            display.advance(len(results.missing(variant)))


def _run_variant(
    scenario: Scenario,
    variant: Variant,
    model: str,
    file: Path | None,
    results: Results,
    display: Display,
    deadline: Deadline,
) -> None:
    def starting(text: str) -> None:
        display.doing(f"{variant.name}: starting, {text}")

    with serve(scenario, variant, model, results.logs, starting) as deployment:
        display.say(f"{variant.name}: serving after {display.lap():.0f} s")
        _check_tokens(scenario, variant, model, deployment, results, display)
        for point in results.missing(variant):
            if deadline.passed:
                display.say(f"{variant.name}, {point.label}: left for the next call (--time-limit)")
                continue
            _run_point(scenario, variant, point, model, file, deployment, results, display)
            display.advance(1)
        display.doing(f"{variant.name}: stopping")


def _dataset(scenario: Scenario, variants: Sequence[Variant], model: str, folder: Path) -> Path | None:
    if not workload.needs_file(scenario.load):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ranks = max(variant.ranks for variant in variants)
    path = folder / "requests.jsonl"
    workload.write_file(
        scenario.load,
        ranks,
        lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        lambda ids: str(tokenizer.decode(ids)),
        path,
    )
    return path


def _check_tokens(
    scenario: Scenario, variant: Variant, model: str, deployment: Deployment, results: Results, display: Display
) -> None:
    check = scenario.check
    if not check.requests or results.tokens(variant) is not None:
        return
    display.doing(f"{variant.name}: sampled requests for the token check")
    prompts = workload.sampled_prompts(scenario.load, check.requests, vocabulary_size(model))
    generated = tokens.generate(deployment, prompts, check.new_tokens)
    results.write(variant, "tokens", {"tokens": generated})
    display.say(f"{variant.name}: {check.requests} sampled requests on {len(generated)} ranks, {display.lap():.0f} s")


def _run_point(
    scenario: Scenario,
    variant: Variant,
    point: Point,
    model: str,
    file: Path | None,
    deployment: Deployment,
    results: Results,
    display: Display,
) -> None:
    name = f"{variant.name}, {point.label}"
    raw = results.logs / f"{variant.name}.{point.key}.jsonl"
    arguments = client.command(deployment, model, scenario.load, point, file, raw)
    log = raw.with_suffix(".log")
    record = client.run(
        deployment, arguments, raw, log, scenario.run_timeout_s, lambda text: display.doing(f"{name}: {text}")
    )
    raw.unlink()
    record["peak_queue"] = [max(row) for row in depths(record["queues"])]
    results.write(variant, point.key, record)
    data = record["benchmark"]
    display.say(
        f"{name}: TTFT {data['median_ttft_ms']:.0f} ms (p99 {data['p99_ttft_ms']:.0f}), TPOT "
        f"{data['median_tpot_ms']:.1f} ms, {data['input_throughput']:,.0f} in + {data['output_throughput']:,.0f} out "
        f"tok/s, {display.lap():.0f} s"
    )
    for line in queue_lines(record):
        display.say(line)


def queue_lines(record: dict[str, Any]) -> list[str]:
    """Requests on each rank over the time of a run, drawn as bars."""
    rows = depths(record["queues"])
    top = max((max(row) for row in rows if row), default=0)
    return [
        f"  requests on rank {rank} over time, at most {max(row):3d}: {sparkline(row, top)}"
        for rank, row in enumerate(rows)
    ]


def write_json(results: Results, found: dict[str, Any]) -> Path:
    """Everything of a comparison in one file."""
    path = results.folder / "results.json"
    path.write_text(json.dumps(results.as_json(found)) + "\n")
    return path
