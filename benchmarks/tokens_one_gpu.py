"""The same tokens in every mode, every server on ONE GPU: python benchmarks/tokens_one_gpu.py [MODEL]

Starts an engine that holds all experts and DWDP engines in their modes, sends 64 prompts of 1 to 8192 tokens to
every rank (one at a time on each, so that batches are the same), and compares tokens and their log-probabilities.
All ranks of an engine share a GPU and talk through gloo, and several engines run at a time, so nothing here is a
timing. MODEL is a checkpoint folder; its tokenizer is not used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import cycle
from pathlib import Path
from typing import Any

from one_gpu import one_gpu_environment
from qwen3_layers import model_path  # makes the package importable
from rich.console import Console
from rich.table import Table

from benchmarks.engines import FIRST_PORT, PORTS

DWDP = {"tp_size": 2, "enable_dwdp": True}
EAGER = {"disable_cuda_graph": True, "disable_overlap_schedule": True, "chunked_prefill_size": 1024}
PREFILL_GRAPHS = {"cuda_graph_backend_prefill": "breakable", "cuda_graph_bs_prefill": [64, 512, 2048]}

# name: (engine options, the engine whose tokens are expected)
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "resident": ({"tp_size": 1}, ""),
    "resident, eager": ({"tp_size": 1, **EAGER}, ""),
    "resident, prefill graphs": ({"tp_size": 1, **PREFILL_GRAPHS}, ""),
    "4 ranks in 2 groups": ({**DWDP, "tp_size": 4, "dwdp_group_size": 2}, "resident"),
    "auto": (DWDP, "resident"),
    "auto, eager, no overlap, chunks of 1024": ({**DWDP, **EAGER}, "resident, eager"),
    "auto, no overlap": ({**DWDP, "disable_overlap_schedule": True}, "resident"),
    "staged": ({**DWDP, "dwdp_view": "staged"}, "resident"),
    "direct, prefill graphs": ({**DWDP, "dwdp_view": "direct", **PREFILL_GRAPHS}, "resident, prefill graphs"),
    "3 ranks, 64 local experts": ({**DWDP, "tp_size": 3, "dwdp_local_experts": 64}, "resident"),
    "cuda-ipc": ({**DWDP, "dwdp_transport": "cuda-ipc"}, "resident"),
}
PROMPTS = 64
NEW_TOKENS = 16

Answer = tuple[list[int], list[float]]  # tokens, their log-probabilities


def prompts() -> list[list[int]]:
    """64 prompts of 1 to 8192 tokens; every fourth goes on where an earlier one ended (for the radix cache)."""
    draw = random.Random(0)
    result: list[list[int]] = []
    for index in range(PROMPTS):
        length = round(8192 ** (index / (PROMPTS - 1)))
        known = result[index - 3] if index % 4 == 3 else []
        result.append([*known, *(draw.randrange(10, 2000) for _ in range(length - len(known)))][:length])
    return result


def measure(name: str, model: str) -> dict[str, Any]:
    """In a process of its own: every rank's answers, and the ranks' reports."""
    import sglang

    options = VARIANTS[name][0]
    defaults = {"cuda_graph_backend_prefill": "disabled", "chunked_prefill_size": 8192}
    engine = sglang.Engine(
        model_path=model,
        skip_tokenizer_init=True,
        port=FIRST_PORT + PORTS * list(VARIANTS).index(name),
        attention_backend="triton",
        moe_runner_backend="triton",
        disable_custom_all_reduce=True,
        cuda_graph_max_bs_decode=4,
        max_prefill_tokens=8192,
        max_total_tokens=32768,
        max_running_requests=8,
        mem_fraction_static=0.97,  # of what the other engines leave
        sleep_on_idle=True,
        log_level="info",
        **(defaults | options),
    )
    ranks = options["tp_size"]
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}

    async def of_rank(rank: int) -> list[Answer]:
        where = {"routed_dp_rank": rank} if ranks > 1 else {}
        answers = []
        for prompt in prompts():
            answer = await engine.async_generate(
                input_ids=prompt, sampling_params=sampling, return_logprob=True, **where
            )
            chosen = answer["meta_info"]["output_token_logprobs"]
            answers.append((answer["output_ids"], [entry[0] for entry in chosen]))
        return answers

    async def of_all() -> list[list[Answer]]:
        return await asyncio.gather(*(of_rank(rank) for rank in range(ranks)))

    answers = engine.loop.run_until_complete(of_all())
    states = engine.get_server_info()["internal_states"]
    engine.shutdown()
    return {"answers": answers, "reports": [state.get("dwdp") for state in states]}


def run_variant(name: str, model: str, gpu: int, logs: Path, timeout_s: float) -> dict[str, Any]:
    """A variant's result on a GPU, or its error."""
    options = VARIANTS[name][0]
    log = logs / ("tokens " + name + ".log").replace(" ", "_").replace(",", "")
    with tempfile.TemporaryDirectory() as directory, log.open("w") as output:
        result = Path(directory) / "result.json"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        if options["tp_size"] > 1:
            environment |= one_gpu_environment(Path(directory))
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
            return done
    return {"error": f"exit code {code}", "log": log.read_text().splitlines()[-30:]}


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each DWDP engine: how many answers have the expected tokens and, bitwise, log-probabilities."""
    summary: dict[str, Any] = {}
    for name, result in results.items():
        expected = results.get(VARIANTS[name][1])
        if "error" in result or expected is None or "error" in expected:
            summary[name] = {"error": result.get("error", "nothing to compare with")} if VARIANTS[name][1] else {}
            continue
        pairs = [pair for rank in result["answers"] for pair in zip(rank, expected["answers"][0], strict=True)]
        summary[name] = {
            "answers": len(pairs),
            "same_tokens": sum(mine[0] == theirs[0] for mine, theirs in pairs),
            "same_logprobs": sum(mine[1] == theirs[1] for mine, theirs in pairs),
            "reports": result["reports"],
        }
    return summary


def show(summary: dict[str, Any], console: Console) -> None:
    """One row for each DWDP engine."""
    table = Table(title=f"{PROMPTS} prompts of 1 to 8192 tokens on every rank, against all experts on one rank")
    for column in ("", "answers", "same tokens", "same log-probabilities, bitwise", "direct forwards", "staged"):
        table.add_column(column)
    for name, row in summary.items():
        if "error" in row:
            table.add_row(name, row["error"])
        elif row:
            counts = [str(row[key]) for key in ("answers", "same_tokens", "same_logprobs")]
            sums = [str(sum(r[key] for r in row["reports"])) for key in ("direct_forwards", "staged_forwards")]
            table.add_row(name, *counts, *sums)
    console.print(table)


def main() -> None:
    """Run the engines, some at a time; print the table, write the JSON; exit code 1 where a token differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: eight layers of Qwen3-30B-A3B's shape, made on first use")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="engines are spread over these")
    parser.add_argument("--at-a-time", type=int, default=3, help="engines that run at a time, of all GPUs together")
    parser.add_argument("--out", type=Path, default=Path("tokens_one_gpu.json"))
    parser.add_argument("--logs", type=Path, default=Path())
    parser.add_argument("--timeout", type=float, default=330, help="seconds for one engine")
    parser.add_argument("--measure", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        args.out.write_text(json.dumps(measure(args.measure, args.model)))
        return
    console = Console(width=140)
    model = model_path(args.model)
    with ThreadPoolExecutor(args.at_a_time) as pool:
        gpus = cycle(args.gpus)
        runs = {
            pool.submit(run_variant, name, model, next(gpus), args.logs, args.timeout): name for name in args.variants
        }
        results: dict[str, dict[str, Any]] = {}
        for run in as_completed(runs):  # what is there is written at once: the last engines may take long
            results[runs[run]] = run.result()
            summary = compare({name: results[name] for name in args.variants if name in results})
            args.out.write_text(json.dumps(summary, indent=1))
            console.print(f"{runs[run]}: {'failed' if 'error' in results[runs[run]] else 'done'}")
    show(summary, console)
    for name, result in results.items():
        if "error" in result:
            console.print(f"{name}: {result['error']}\n" + "\n".join(result["log"][-12:]), markup=False)
    if any(row and row.get("same_tokens") != row.get("answers", -1) for row in summary.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
