"""All experts resident, this plugin, and SGLang's own DWDP, on ONE GPU: python benchmarks/compare_one_gpu.py [MODEL]

Two ranks share the GPU: rank 0 is busy, rank 1 idle. Their "link" is the GPU's own memory, several times faster
than NVLink, so this proves tokens and host overhead and bounds what copies cost; it says nothing about NVLink.
All engines are started first and then take turns, workload by workload (see engines.py). Compare ratios of one run.
MODEL is a checkpoint folder; its tokenizer is not used.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from one_gpu import one_gpu_environment
from qwen3_layers import model_path  # puts the repository's root on the path
from rich.console import Console
from rich.table import Table
from setup_memory import probe_environment, readings

from benchmarks.engines import (
    EngineError,
    EngineProcess,
    Prompts,
    answer_requests,
    engine_process,
    start_engine,
)

DWDP = {"tp_size": 2, "enable_dwdp": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "resident": {"tp_size": 1},
    "dwdp": DWDP,
    "in-tree": {"tp_size": 2, "dwdp_size": 2},
    "dwdp-direct": {**DWDP, "dwdp_view": "direct"},
}
CHUNK = 8192
PREFILLS = ((4, 8192), (1, 1024))
DECODES = (1, 8, 32)
STEPS = 96
LENGTHS = (1, 7, 33, 130, 300, 513, 1025, 4097)
REPEATS = 5
WARM_UP = 2


def serve(name: str, model: str, descriptor: int) -> None:
    """In a process of its own: an engine that answers the parent's requests until there are no more."""
    options = VARIANTS[name]
    ranks = options["tp_size"]
    # SGLang divides the chunk by the ranks for its own DWDP; a rank's chunk is the same for all variants. It divides
    # the running requests by the ranks of all attention data parallelism.
    chunk = CHUNK * (ranks if "dwdp_size" in options else 1)
    common = {
        "model_path": model,
        "attention_backend": "triton",
        "moe_runner_backend": "triton",
        "disable_custom_all_reduce": True,
        "cuda_graph_backend_prefill": "disabled",
        "cuda_graph_max_bs_decode": max(DECODES),
        "chunked_prefill_size": chunk,
        "max_prefill_tokens": CHUNK,
        "max_total_tokens": 36864,
        "max_running_requests": max(DECODES) * ranks,
        "mem_fraction_static": 0.97,  # of what the other engines leave
    }
    engine = start_engine(common | options, list(VARIANTS).index(name))
    answer_requests(engine, descriptor, lambda folder: trace(engine, folder, ranks))


def trace(engine: Any, folder: Path, ranks: int) -> None:
    """Leave SGLang's profile of 16 steps of one sequence, after a prefill of 1,024 tokens, in `folder`."""
    where = {"routed_dp_rank": 0} if ranks > 1 else {}
    sampling = {"temperature": 0, "max_new_tokens": 17, "ignore_eos": True}
    engine.start_profile(output_dir=str(folder), activities=["CPU", "GPU"], with_stack=False, record_shapes=False)
    engine.generate(input_ids=[[11] * 1024], sampling_params=sampling, **where)
    engine.stop_profile()


class Variant:
    """An engine in another process, of which one rank is busy at a time."""

    def __init__(self, engine: EngineProcess) -> None:
        self.name = engine.name
        self._engine = engine

    def run(self, prompts: Prompts, new_tokens: int, rank: int = 0) -> tuple[float, Prompts]:
        """Seconds for all prompts together, and their new tokens."""
        seconds, answers = self._ask(lambda: self._engine.run({rank: prompts}, new_tokens))
        return seconds, [answer.tokens for answer in answers[rank]]

    def profile(self, folder: Path) -> None:
        """See `trace`."""
        self._ask(lambda: self._engine.ask(folder))

    def stop(self) -> list[Any]:
        """Let the engine end; the ranks' reports."""
        reports: list[Any] = self._ask(self._engine.stop)
        return reports

    @staticmethod
    def _ask(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except EngineError as error:
            raise SystemExit(f"{error}; see its log") from None


@contextmanager
def process_of(name: str, model: str, directory: Path, logs: Path) -> Iterator[EngineProcess]:
    """A variant's process, which says when its engine is ready. Everything it started is gone afterwards."""
    directory.mkdir()
    environment: dict[str, str] = {}
    if VARIANTS[name]["tp_size"] > 1:
        environment = one_gpu_environment(directory) | probe_environment(directory)
    command = [sys.executable, __file__, model, "--serve", name]
    with engine_process(name, command, environment, logs / f"{name}.log") as started:
        yield started


def take_turns(variants: list[Variant], console: Console) -> dict[str, dict[str, Any]]:
    """Tokens, then every workload's seconds, the variants one after the other in every repeat."""
    draw = random.Random(0)

    def prompts(count: int, length: int) -> Prompts:
        return [[draw.randrange(10, 2000) for _ in range(length)] for _ in range(count)]

    results: dict[str, dict[str, Any]] = {v.name: {"tokens": [], "tokens_rank_1": [], "times_s": {}} for v in variants}
    for length in LENGTHS:
        prompt = prompts(1, length)
        for variant in variants:
            results[variant.name]["tokens"] += variant.run(prompt, 16)[1]
            other = 1 if VARIANTS[variant.name]["tp_size"] > 1 else 0
            results[variant.name]["tokens_rank_1"] += variant.run(prompt, 16, other)[1]
    workloads = [(f"prefill {n} x {length}", n, length, 0) for n, length in PREFILLS]
    workloads += [(f"decode, {n}", n, 16, STEPS) for n in DECODES]
    for row, count, length, steps in workloads:
        console.print(f"{row} …")
        for repeat in range(REPEATS + WARM_UP):
            # Each time another variant begins, and is the one that finds the GPU as the last workload left it.
            for variant in variants[repeat % len(variants) :] + variants[: repeat % len(variants)]:
                given = prompts(count, length)
                seconds = variant.run(given, steps + 1)[0] - (variant.run(given, 1)[0] if steps else 0)
                if repeat >= WARM_UP:
                    results[variant.name]["times_s"].setdefault(row, []).append(seconds)
        for result in results.values():
            done = count * (steps or length)
            result.setdefault("tokens_per_s", {})[row] = done / statistics.median(result["times_s"][row])
    return results


def run_all(
    names: list[str], model: str, logs: Path, timeout_s: float, console: Console, traces: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Every variant's result, or its error.  traces: where profiles of all variants go, if any are wanted."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = {name: stack.enter_context(process_of(name, model, root / name, logs)) for name in names}
        console.print(f"starting {', '.join(names)} …")
        deadline = time.monotonic() + timeout_s
        variants = [Variant(engine) for engine in started.values() if engine.ready(deadline)]
        results = take_turns(variants, console) if variants else {}
        for variant in variants if traces is not None else ():
            variant.profile(traces / variant.name)
        for variant in variants:
            results[variant.name] |= {"reports": variant.stop(), "setup_memory": readings(root / variant.name)}
    for name in names:
        if name not in results:
            lines = (logs / f"{name}.log").read_text().splitlines()[-30:]
            results[name] = {"error": f"did not start within {timeout_s:.0f} s", "log": lines}
    return {name: results[name] for name in names}


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """One row for each workload, one column for each variant: tokens per second, and the ratio to resident."""
    done = {name: result for name, result in results.items() if "error" not in result}
    base = done.get("resident")
    table = Table(title="tokens per second (ratio to all experts resident), one GPU, two ranks, one of them busy")
    table.add_column("")
    for name in done:
        table.add_column(name, justify="right")
    for row in next(iter(done.values()))["tokens_per_s"] if done else ():
        cells = []
        for result in done.values():
            rate = result["tokens_per_s"].get(row)
            if rate is None:
                cells.append("")
                continue
            cells.append(f"{rate:,.0f}" + (f" ({rate / base['tokens_per_s'][row]:.2f})" if base else ""))
        table.add_row(row, *cells)
    if base:
        for label, key in (("same tokens, rank 0", "tokens"), ("same tokens, rank 1", "tokens_rank_1")):
            same = [sum(a == b for a, b in zip(r[key], base["tokens"], strict=True)) for r in done.values()]
            table.add_row(label, *(f"{count} of {len(LENGTHS)}" for count in same))
        for label, key in (("held by a rank after loading, MiB", "before"), ("… at most while sharing", "peak")):
            found = [max((rank[key] for rank in r.get("setup_memory", ())), default=0) for r in done.values()]
            table.add_row(label, *(f"{nbytes / 2**20:,.0f}" if nbytes else "" for nbytes in found))
    console.print(table)
    for name, result in results.items():
        if "error" in result:
            console.print(f"{name}: {result['error']}\n" + "\n".join(result["log"][-12:]), markup=False)


def describe() -> dict[str, str]:
    """What the figures were measured with."""
    import torch

    versions = {name: version(name) for name in ("sglang", "torch", "sglang-dwdp")}
    gpu = torch.cuda.get_device_name(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return versions | {
        "gpu": gpu,
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def main() -> None:
    """Start the variants, let them take turns; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: eight layers of Qwen3-30B-A3B's shape, made on first use")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS)[:4])
    parser.add_argument("--out", type=Path, default=Path("compare_one_gpu.json"))
    parser.add_argument("--logs", type=Path, default=Path())
    parser.add_argument("--timeout", type=float, default=400, help="seconds for all variants to start")
    parser.add_argument("--traces", type=Path, help="a folder for SGLang's profile of a few steps of every variant")
    parser.add_argument("--serve", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--connection", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.model, args.connection)
        return
    console = Console(width=120)
    args.logs.mkdir(parents=True, exist_ok=True)
    results = run_all(args.variants, model_path(args.model), args.logs, args.timeout, console, args.traces)
    args.out.write_text(json.dumps({"machine": describe(), "results": results}, indent=1) + "\n")
    show(results, console)


if __name__ == "__main__":
    main()
