"""Starts a scenario's servers, checks their tokens, and runs SGLang's serving benchmark at every load."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.processes import RunError, reason
from benchmarks.serving.client import Client, preload
from benchmarks.serving.load import checked_prompts, dataset_options, write_bursty
from benchmarks.serving.scenario import Load, Scenario
from benchmarks.serving.servers import Deployment, start
from benchmarks.turns import counted
from benchmarks.variants import TIMED

Result = dict[str, Any]
CHECKED_TOKENS = 16
# Of SGLang's result: what is as long as the run.
_DETAILS = ("generated_texts", "itls", "errors", "output_details", "server_info", "input_lens", "output_lens", "ttfts")


class Comparison:
    """One run; `result` grows as it goes.

    Args:
        scenario: What runs.
        model: Its checkpoint.
        folder: Where logs and the benchmark's own results go.
        save: Called with the result whenever something was added.
        say: Called with a line of progress.
        end: Of the time (monotonic clock); nothing is begun after it.
    """

    def __init__(
        self,
        scenario: Scenario,
        model: str,
        folder: Path,
        save: Callable[[Result], None],
        say: Callable[[str], None],
        end: float,
    ) -> None:
        self._scenario, self._model, self._folder = scenario, model, folder
        self._save, self._say, self._end = save, say, end
        self.result: Result = {"variants": {}, "runs": []}
        self._expected: list[list[int]] | None = None
        self._files: dict[str, Path] = {}  # of loads that SGLang's benchmark reads

    def run(self, names: Sequence[str]) -> Result:
        """Measure the named variants.

        Returns:
            `variants`: by name `start_s`, `same_tokens` (a part of 1), `untuned`, `error`. `runs`: `load`, `variant`,
            `benchmark` (SGLang's own figures) and `dwdp`, the counters of each rank.
        """
        scenario = self._scenario
        preload()
        for name, load in scenario.loads.items():
            if load.bursty:
                from transformers import AutoTokenizer

                self._files[name] = self._folder / f"{name}-requests.jsonl"
                write_bursty(load, scenario.ranks, AutoTokenizer.from_pretrained(self._model), self._files[name])
        # The reference comes first: the others' tokens are compared with its.
        ordered = sorted(names, key=lambda name: name != scenario.reference)
        for first in range(0, len(ordered), scenario.together):
            with ExitStack() as stack:
                self._group(ordered[first : first + scenario.together], stack)
        return self.result

    def _group(self, names: Sequence[str], stack: ExitStack) -> None:
        running: dict[str, Deployment] = {}
        found = self.result["variants"]
        quiet = [name for name in names if self._scenario.variants[name].kind in TIMED]
        for name in (*quiet, *(name for name in names if name not in quiet)):
            found[name] = {"kind": self._scenario.variants[name].kind}
            if time.monotonic() > self._end:
                found[name]["error"] = "no time left"
                continue
            self._say(f"starting {name}")
            try:
                running[name] = stack.enter_context(start(self._scenario, name, self._model, self._folder))
                if name in quiet:
                    found[name]["start_s"] = round(running[name].wait(self._scenario.start_timeout_s), 1)
            except (RunError, ValueError) as error:
                self._failed(running, name, error)
        running = {name: running[name] for name in names if name in running}
        for name, deployment in list(running.items()):
            try:
                found[name].setdefault("start_s", round(deployment.wait(self._scenario.start_timeout_s), 1))
                self._say(f"{name} answers after {found[name]['start_s']} s")
                if self._scenario.reference:
                    self._check(name, deployment)
            except RunError as error:
                self._failed(running, name, error)
        for load_name, load in self._scenario.loads.items():
            for point, options in load.points():
                label = f"{load_name}, {point}"
                for name, deployment in list(running.items()):
                    if time.monotonic() > self._end:
                        found[name].setdefault("error", f"no time left for {label}")
                        continue
                    sent = dataset_options(load, self._files.get(load_name)) + options
                    try:
                        self._measure(name, deployment, label, load, sent)
                        found[name]["untuned"] = deployment.untuned()
                    except RunError as error:
                        self._failed(running, name, error)

    def _failed(self, running: dict[str, Deployment], name: str, error: Exception) -> None:
        running.pop(name, None)
        self.result["variants"][name]["error"] = str(error)
        self._say(f"{name}: {error}")
        self._save(self.result)

    def _check(self, name: str, deployment: Deployment) -> None:
        """Compare answers of the idle server, on each rank, with the reference's."""
        ranks = 1 if self._scenario.variants[name].kind in ("tp", "single") else self._scenario.ranks
        answers = deployment.answers(checked_prompts(next(iter(self._scenario.loads.values()))), CHECKED_TOKENS, ranks)
        if self._expected is None and name == self._scenario.reference:
            self._expected = answers[0]
        if self._expected is not None:
            same = [got == right for row in answers for got, right in zip(row, self._expected, strict=True)]
            self.result["variants"][name]["same_tokens"] = sum(same) / len(same)

    def _measure(self, name: str, deployment: Deployment, label: str, load: Load, options: list[str]) -> None:
        key = f"{name}-{label}".replace(", ", "-").replace(" ", "-").replace("/", "-per-")
        out = self._folder / f"{key}.jsonl"
        out.unlink(missing_ok=True)
        before = deployment.reports()
        client = Client(benchmark_arguments(deployment, self._model, load, options, out), self._folder / f"{key}.log")
        try:
            while client.exit_code() is None:
                deployment.check_alive()
                if time.monotonic() - client.started > self._scenario.run_timeout_s:
                    raise RunError(f"the benchmark took longer than {self._scenario.run_timeout_s:g} s ({client.log})")
                time.sleep(0.2)
        finally:
            client.stop()
        if client.exit_code() != 0 or not out.is_file():
            raise RunError(
                f"the benchmark ended with exit code {client.exit_code()}: {reason(client.log)} ({client.log})"
            )
        figures = condensed(json.loads(out.read_text().splitlines()[-1]))
        counters = [counted(after, earlier) for after, earlier in zip(deployment.reports(), before, strict=False)]
        self.result["runs"].append({"load": label, "variant": name, "benchmark": figures, "dwdp": counters})
        rate, ttft = figures["total_throughput"], figures["median_ttft_ms"]
        self._say(f"{name}, {label}: {rate:,.0f} tok/s in and out, TTFT {ttft:.0f} ms")
        self._save(self.result)


def benchmark_arguments(deployment: Deployment, model: str, load: Load, options: list[str], out: Path) -> list[str]:
    """Of `python -m sglang.benchmark.serving` for one run."""
    arguments = ["--base-url", deployment.url, "--model", model]
    arguments += ["--num-prompts", str(load.requests), "--seed", str(load.seed), "--warmup-requests", "2"]
    arguments += options
    if deployment.routed:  # the router has no /model_info; and no flush of two servers' caches
        arguments += ["--tokenizer", model, "--pd-separated", "--ready-check-timeout-sec", "0"]
    return [*arguments, "--output-file", str(out), "--output-details"]


def condensed(result: Result) -> Result:
    """SGLang's result without what is as long as all that was sent.

    Raises:
        RunError: Requests failed.
    """
    errors = [error for error in result.get("errors", ()) if error]
    if errors:
        last = errors[0].strip().splitlines()[-1]
        raise RunError(f"{len(errors)} of {len(result['errors'])} requests failed, the first with: {last[:300]}")
    return {key: value for key, value in result.items() if key not in _DETAILS}
