"""A comparison from start to end: variants are served, checked, run at every load point, and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import client, tokens, workload
from benchmarks.serving.deployment import Deployment, start
from benchmarks.serving.errors import RunError
from benchmarks.serving.figures import all_rows, as_record
from benchmarks.serving.models import vocabulary_size
from benchmarks.serving.progress import Display
from benchmarks.serving.queues import depths, lines_of
from benchmarks.serving.results import Results
from benchmarks.serving.scenario import Point, Scenario, Variant
from benchmarks.serving.tables import heading

_BROKEN_S = 10.0  # SGLang waits for requests that it has not answered; after a failure nobody does


class Deadline:
    """After `seconds` (0: never) nothing new is begun; what is missing then is left for the next call."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else float("inf")

    @property
    def passed(self) -> bool:
        """Whether it is too late to begin anything."""
        return time.monotonic() > self._end


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """What every step of a comparison needs.

    model: as servers get it.  dataset: the file of requests, None where SGLang's benchmark draws them.
    """

    scenario: Scenario
    model: str
    dataset: Path | None
    results: Results
    display: Display
    deadline: Deadline

    @contextlib.contextmanager
    def failures_of(self, variant: Variant) -> Iterator[None]:
        """A `RunError` inside is recorded and shown as the variant's, and ends there."""
        try:
            yield
        except RunError as error:
            self.results.write(variant, "error", {"error": str(error)})
            self.display.say(f"{variant.name}: failed: {error}")
            self.display.advance(len(self.results.missing(variant)))


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
    file = _dataset(scenario, model, results.folder)
    whole = Comparison(scenario, model, file, results, display, deadline)
    for variant in variants:
        display.advance(len(scenario.load.points()) - len(results.missing(variant)))
        if results.complete(variant):
            display.say(f"{variant.name}: kept from an earlier call")
    missing = [variant for variant in variants if not results.complete(variant)]
    for first in range(0, len(missing), scenario.together):
        group = missing[first : first + scenario.together]
        if deadline.passed:
            for variant in group:
                display.say(f"{variant.name}: left for the next call (--time-limit)")
        else:
            _run_group(whole, group)


def _run_group(whole: Comparison, group: Sequence[Variant]) -> None:
    """Start the variants of a group together, and let them take turns at every load point."""
    display, serving = whole.display, dict[str, Deployment]()
    display.lap()

    def step(variant: Variant, do: Callable[..., None], *arguments: Any) -> None:
        deployment = serving.get(variant.name)
        if deployment is None:
            return
        with whole.failures_of(variant):
            do(whole, variant, deployment, *arguments)
            return
        del serving[variant.name]
        deployment.stop(_BROKEN_S)

    def ask_all_to_stop() -> None:
        for deployment in serving.values():
            deployment.ask_to_stop()

    with contextlib.ExitStack() as stack:
        for variant in group:
            whole.results.forget_error(variant)
            with whole.failures_of(variant):
                started = start(whole.scenario, variant, whole.model, whole.results.logs)
                serving[variant.name] = stack.enter_context(started)
        stack.callback(ask_all_to_stop)
        for variant in group:
            step(variant, _wait)
        for variant in group:
            step(variant, _warm_up)
        for variant in group:
            step(variant, _check_tokens)
        for point in whole.scenario.load.points():
            for variant in group:
                step(variant, _run_point, point)
        display.doing(f"stopping {', '.join(serving)}")


def _dataset(scenario: Scenario, model: str, folder: Path) -> Path | None:
    if not workload.needs_file(scenario.load):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ranks = max(variant.ranks for variant in scenario.variants)  # the same requests, whichever are chosen
    path = folder / "requests.jsonl"
    workload.write_file(
        scenario.load,
        ranks,
        lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        lambda ids: str(tokenizer.decode(ids)),
        path,
    )
    return path


def _wait(whole: Comparison, variant: Variant, deployment: Deployment) -> None:
    seconds = deployment.wait(whole.scenario.start_timeout_s, whole.display.doing)
    whole.display.say(f"{variant.name}: serving after {seconds:.0f} s")
    whole.display.lap()


def _warm_up(whole: Comparison, variant: Variant, deployment: Deployment) -> None:
    whole.display.doing(f"{variant.name}: warm-up")
    longest = max(workload.prompt_lengths(whole.scenario.load, 1))
    scenario = whole.scenario
    tokens.warm_up(deployment, longest, scenario.chunk_tokens, vocabulary_size(whole.model), scenario.run_timeout_s)
    whole.display.say(f"{variant.name}: warm, {whole.display.lap():.0f} s")


def _check_tokens(whole: Comparison, variant: Variant, deployment: Deployment) -> None:
    check, display = whole.scenario.check, whole.display
    if not check.requests or whole.results.tokens(variant) is not None:
        return
    display.doing(f"{variant.name}: sampled requests for the token check")
    prompts = workload.sampled_prompts(whole.scenario.load, check.requests, vocabulary_size(whole.model))
    generated = tokens.generate(deployment, prompts, check.new_tokens, whole.scenario.run_timeout_s)
    whole.results.write(variant, "tokens", {"tokens": generated})
    display.say(f"{variant.name}: {check.requests} sampled requests on {len(generated)} ranks, {display.lap():.0f} s")


def _run_point(whole: Comparison, variant: Variant, deployment: Deployment, point: Point) -> None:
    name, display = f"{variant.name}, {point.label}", whole.display
    if whole.results.run(variant, point) is not None:
        return
    if whole.deadline.passed:
        display.say(f"{name}: left for the next call (--time-limit)")
        return
    raw = whole.results.logs / f"{variant.name}.{point.key}.jsonl"
    log = raw.with_suffix(".log")
    arguments = client.command(deployment, whole.model, whole.scenario.load, point, whole.dataset, raw)
    timeout_s = whole.scenario.run_timeout_s
    record = client.run(deployment, arguments, raw, log, timeout_s, lambda text: display.doing(f"{name}: {text}"))
    raw.unlink()
    record["peak_queue"] = [max(row, default=0) for row in depths(record["queues"])]
    whole.results.write(variant, point.key, record)
    display.advance(1)
    data = record["benchmark"]
    display.say(
        f"{name}: TTFT {data['median_ttft_ms']:.0f} ms (p99 {data['p99_ttft_ms']:.0f}), TPOT "
        f"{data['median_tpot_ms']:.1f} ms, {data['input_throughput']:,.0f} in + {data['output_throughput']:,.0f} out "
        f"tok/s, {display.lap():.0f} s"
    )
    for line in lines_of(record["queues"]):
        display.say(line)


def write_json(results: Results, found: dict[str, Any]) -> Path:
    """Everything of a comparison in one file."""
    path = results.folder / "results.json"
    tables = {
        "heading": dataclasses.asdict(heading(results.scenario)),
        "figures": list(map(as_record, all_rows(results))),
    }
    path.write_text(json.dumps(results.as_json(found) | tables) + "\n")
    return path
