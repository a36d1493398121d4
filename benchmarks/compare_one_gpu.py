"""All experts resident, this plugin, and SGLang's own DWDP, on ONE GPU: python benchmarks/compare_one_gpu.py [MODEL]

Two ranks share the GPU: rank 0 is busy, rank 1 idle. Their "link" is the GPU's own memory, several times faster
than NVLink, so this proves tokens and host overhead and bounds what copies cost; it says nothing about NVLink.
Compare ratios of one run. MODEL is a checkpoint folder; its tokenizer is not used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from one_gpu import one_gpu_environment
from qwen3_layers import model_path
from rich.console import Console
from rich.table import Table
from setup_memory import probe_environment, readings

VARIANTS: dict[str, dict[str, Any]] = {
    "resident": {"tp_size": 1},
    "dwdp": {"tp_size": 2, "enable_dwdp": True},
    "dwdp-direct": {"tp_size": 2, "enable_dwdp": True, "dwdp_view": "direct"},
    "in-tree": {"tp_size": 2, "dwdp_size": 2},
}
CHUNK = 8192
PREFILLS = ((4, 8192), (1, 1024))
DECODES = (1, 8, 32)
STEPS = 128
LENGTHS = (1, 7, 33, 130, 300, 513, 1025, 4097)
REPEATS = 5


def measure(name: str, model: str) -> dict[str, Any]:
    """In a process of its own: one variant's tokens, tokens per second, and reports."""
    import sglang

    options = VARIANTS[name]
    ranks = options["tp_size"]
    # SGLang divides the chunk by the ranks for its own DWDP; a rank's chunk is the same for all variants.
    chunk = CHUNK * (ranks if "dwdp_size" in options else 1)
    start = time.perf_counter()
    engine = sglang.Engine(
        model_path=model,
        skip_tokenizer_init=True,
        attention_backend="triton",
        moe_runner_backend="triton",
        disable_custom_all_reduce=True,
        cuda_graph_backend_prefill="disabled",
        cuda_graph_max_bs_decode=max(DECODES),
        disable_radix_cache=True,
        chunked_prefill_size=chunk,
        max_prefill_tokens=CHUNK,
        max_total_tokens=65536,
        max_running_requests=64,
        mem_fraction_static=0.35,
        log_level="info",
        **options,
    )
    start_s = time.perf_counter() - start
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(10, 2000) for _ in range(length)]

    def run(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        where = {"routed_dp_rank": 0} if ranks > 1 else {}
        begin = time.perf_counter()
        answers = engine.generate(input_ids=prompts, sampling_params=sampling, **where)
        return time.perf_counter() - begin, [answer["output_ids"] for answer in answers]

    tokens = [run([prompt(length)], 16)[1][0] for length in LENGTHS]
    if ranks > 1:
        draw = random.Random(0)
        other = [
            engine.generate(
                input_ids=prompt(length),
                sampling_params={"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
                routed_dp_rank=1,
            )["output_ids"]
            for length in LENGTHS
        ]
    else:
        other = tokens
    rates: dict[str, float] = {}
    for batch, length in PREFILLS:
        prompts = [prompt(length) for _ in range(batch)]
        times = [run(prompts, 1)[0] for _ in range(REPEATS + 2)][2:]
        rates[f"prefill {batch} x {length}"] = batch * length / statistics.median(times)
    for batch in () if options.get("dwdp_view") == "direct" else DECODES:  # as decode is on direct views anyway
        prompts = [prompt(16) for _ in range(batch)]
        run(prompts, STEPS + 1)
        times = [run(prompts, STEPS + 1)[0] - run(prompts, 1)[0] for _ in range(REPEATS)]
        rates[f"decode, {batch}"] = batch * STEPS / statistics.median(times)
    states = engine.get_server_info()["internal_states"]
    engine.shutdown()
    return {
        "start_s": start_s,
        "tokens": tokens,
        "tokens_rank_1": other,
        "tokens_per_s": rates,
        "reports": [state.get("dwdp") for state in states],
    }


def run_variant(name: str, model: str, log: Path, timeout_s: float) -> dict[str, Any]:
    """A variant's result, or its error."""
    with tempfile.TemporaryDirectory() as directory, log.open("w") as output:
        result = Path(directory) / "result.json"
        environment = dict(os.environ)
        if VARIANTS[name]["tp_size"] > 1:
            environment |= one_gpu_environment(Path(directory)) | probe_environment(Path(directory))
        command = [sys.executable, __file__, model, "--measure", name, "--out", str(result)]
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)  # its session, whatever is left
        if result.exists():
            done: dict[str, Any] = json.loads(result.read_text())
            return done | {"setup_memory": readings(Path(directory))}
    return {"error": f"exit code {code}", "log": log.read_text().splitlines()[-30:]}


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
    """Run the variants one after the other; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: eight layers of Qwen3-30B-A3B's shape, made on first use")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["resident", "dwdp", "in-tree"])
    parser.add_argument("--out", type=Path, default=Path("compare_one_gpu.json"))
    parser.add_argument("--logs", type=Path, default=Path())
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one variant")
    parser.add_argument("--measure", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        args.out.write_text(json.dumps(measure(args.measure, args.model)))
        return
    console = Console(width=120)
    model = model_path(args.model)
    results: dict[str, dict[str, Any]] = {}
    if args.out.exists():  # variants of an earlier call on this machine stay in the table
        results = json.loads(args.out.read_text())["results"]
    for name in args.variants:
        console.print(f"{name} …")
        results[name] = run_variant(name, model, args.logs / f"{name}.log", args.timeout)
        args.out.write_text(json.dumps({"machine": describe(), "results": results}, indent=1))
    show(results, console)


if __name__ == "__main__":
    main()
