"""SGLang's own serving benchmark as a subprocess: its options, its progress, its JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import launch, workload
from benchmarks.serving.deployment import Deployment
from benchmarks.serving.errors import RunError
from benchmarks.serving.queues import QueueSampler
from benchmarks.serving.scenario import Load, Point
from benchmarks.serving.servers import Process, reason

_POLL_S = 0.2
_PROGRESS = re.compile(r"(\d+)/(\d+) \[")  # tqdm's
# Of SGLang's result: what is as long as the run, and reproduced below in a form that is not.
_DETAILS = ("generated_texts", "itls", "errors", "output_details", "server_info")


def command(deployment: Deployment, model: str, load: Load, point: Point, file: Path | None, out: Path) -> list[str]:
    """`python -m sglang.benchmark.serving …` for one run."""
    result = [sys.executable, "-m", "sglang.benchmark.serving", "--base-url", deployment.url, "--model", model]
    result += ["--num-prompts", str(load.requests), "--seed", str(load.seed)]
    result += workload.dataset_options(load, file) + workload.point_options(point)
    if deployment.routed:  # the router has no /model_info; and no flush of two servers' caches
        result += ["--tokenizer", model, "--pd-separated", "--ready-check-timeout-sec", "0"]
    result += launch.as_arguments({"warmup-requests": 2, **load.options})
    return [*result, "--output-file", str(out), "--output-details"]


def run(
    deployment: Deployment,
    arguments: Sequence[str],
    out: Path,
    log: Path,
    timeout_s: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Run the benchmark once, watching the servers; its result with the queues and DWDP's counters beside it.

    Raises:
        RunError: the benchmark or a server ended, took too long, or left a request unanswered.
    """
    out.unlink(missing_ok=True)
    before = deployment.reports()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    client = Process("the benchmark", arguments, environment, log)
    try:
        with QueueSampler(deployment.loads) as sampler:
            start = time.monotonic()
            while client.exit_code() is None:
                deployment.check_alive()
                if time.monotonic() - start > timeout_s:
                    raise RunError(f"the benchmark took longer than {timeout_s:g} s (run_timeout_s; log: {log})")
                progress(f"{time.monotonic() - start:.0f} s{_done(log)}")
                time.sleep(_POLL_S)
            deployment.check_alive()
    finally:
        client.stop(5)
    if client.exit_code() != 0 or not out.is_file():
        raise RunError(f"the benchmark ended with exit code {client.exit_code()}: {reason(log)} (log: {log})")
    result = json.loads(out.read_text().splitlines()[-1])
    return {
        "command": list(arguments),
        "benchmark": condense(result),
        "queues": sampler.samples,
        "dwdp": [difference(a, b) for a, b in zip(deployment.reports(), before, strict=False)],
    }


def condense(result: dict[str, Any]) -> dict[str, Any]:
    """SGLang's result without what is as long as all generated text; of texts, a hash each.

    Raises:
        RunError: requests failed.
    """
    errors = [error for error in result.get("errors", []) if error]
    if errors:
        last = errors[0].strip().splitlines()[-1]
        raise RunError(f"{len(errors)} of {len(result['errors'])} requests failed, the first with: {last[:300]}")
    kept = {key: value for key, value in result.items() if key not in _DETAILS}
    texts = result.get("generated_texts", [])
    kept["text_hashes"] = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    return kept


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What a rank's counters counted between two reports; what does not grow stays as it is."""
    return {
        key: value - before[key]
        if key in GROWING and isinstance(value, int | float) and isinstance(before.get(key), int | float)
        else value
        for key, value in after.items()
    }


GROWING = (
    "bytes_copied",
    "late_fills",
    "direct_forwards",
    "staged_forwards",
    "forward_tokens",
    "bytes_read_in_place",
    "collectives",
    "exposed_copy_s",
)


def _done(log: Path) -> str:
    """How many requests are answered, from the progress bar in the benchmark's output."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        found = _PROGRESS.findall(file.read().decode(errors="replace"))
    return f", {found[-1][0]} of {found[-1][1]} requests" if found else ""
