"""Engines at SGLang's defaults beside each other on all GPUs: python benchmarks/engines.py [--variants …] [--cases …]

Variants: dwdp, dwdp-mixed (mixed chunks), dwdp-exchange, in-tree (SGLang's --dwdp-size), dep (attention data
parallelism with expert parallelism), replicas, tp. NAME=KIND is a variant of that kind with options of its own:
--variants dep int4=dwdp --set int4 model_path=benchmarks/models/int4 (int4 and nvfp4 have quantized experts, mtp a
draft layer; they are config.json alone, and SGLang draws the weights).

Cases: prefill:TOKENS (one prompt in each forward; the rate is that of --prompts-per-rank prompts on every rank, sent at
once), prefill:TOKENS:PERCENT (lengths vary by so much), decode:SEQUENCES (of a rank; the rate is that between the last
sequence's first token and the first sequence's last), decode:SEQUENCES:RANKS (only so many ranks have sequences).

Engines are started --at-a-time, and take turns. Whatever is finished is in OUT/results.json at once, and each engine's
log beside it. With one GPU, which ranks share, and on the CPU engine (--device cpu), runs prove that the code works.

--tokens sends 64 prompts of 1 to 16,384 tokens to every rank and says how many answers are bitwise those of `replicas`;
weights are then a random checkpoint, made once (without it SGLang draws them).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import checkpoints
from benchmarks.cases import DECODE_TOKENS, Case, parse_case
from benchmarks.engine import EngineProcess
from benchmarks.engine_table import markdown
from benchmarks.machine import machine
from benchmarks.turns import Engine, Result, Turns
from benchmarks.variants import DEFAULT, KINDS, Setting, Variant, engine_options, environment, parse_variants

CASES = ("prefill:1024", "prefill:4096", "prefill:8192", "prefill:16384", "decode:1", "decode:8", "decode:32")
CASES_ON_CPU = ("prefill:96", "decode:2")


def _case(text: str) -> Case:
    try:
        return parse_case(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse(words: list[str] | None = None) -> tuple[argparse.Namespace, list[Variant]]:
    """The command line, and its variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", metavar="KIND", help=f"{', '.join(KINDS)}; or NAME=KIND")
    parser.add_argument("--cases", nargs="*", type=_case, metavar="CASE", help=f"default: {' '.join(CASES)}")
    parser.add_argument("--set", nargs="+", action="append", default=[], metavar=("VARIANT|all", "KEY=VALUE"))
    parser.add_argument("--ranks", type=int, help="default: one for each GPU; two on one GPU or on the CPU")
    parser.add_argument("--layers", type=int, help="of Qwen3-30B-A3B's shape (default: 12; 2 small ones on the CPU)")
    parser.add_argument("--experts", type=int, help="of each layer (default: 128; 12 on the CPU)")
    parser.add_argument("--model", help="a checkpoint folder, instead of that shape with random weights")
    parser.add_argument("--tokens", action="store_true", help="compare tokens and log-probabilities too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts-per-rank", type=int, default=32)
    parser.add_argument("--decode-tokens", type=int, default=DECODE_TOKENS, help="new tokens of each sequence")
    parser.add_argument("--prefill-buckets", nargs="+", type=int, help="default: those that the cases use")
    parser.add_argument("--mem-fraction", type=float, default=0.97, help="0: SGLang's default (default: 0.97)")
    parser.add_argument("--at-a-time", type=int, default=4, help="engines that run beside each other (default: 4)")
    parser.add_argument("--start-limit", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--time-limit", type=float, default=3600, metavar="SECONDS", help="nothing is begun after it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("out/engines"), help="folder of results.json and logs")
    args = parser.parse_args(words)
    cpu = args.device == "cpu"
    if args.cases is None:
        args.cases = [parse_case(text) for text in (CASES_ON_CPU if cpu else CASES)]
    if not args.cases and not args.tokens:
        parser.error("--cases without a case measures nothing; add --tokens, or a case")
    if min(args.repeats, args.prompts_per_rank, args.at_a_time, args.decode_tokens - 1) < 1:
        parser.error("--repeats, --prompts-per-rank and --at-a-time are at least 1, --decode-tokens at least 2")
    default = ["dwdp", "replicas"] if cpu else list(DEFAULT)
    try:
        variants = parse_variants(args.variants or default, args.set)
        args.out.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"results cannot be written: {error}")
    return args, variants


def setting_of(args: argparse.Namespace, variants: list[Variant], devices: int) -> Setting:
    """What the command line says that concerns all variants. May make a checkpoint."""
    dummy = not args.model and not args.tokens and devices > 0
    model = args.model or checkpoints.qwen3(args.layers, args.experts, small=not devices, dummy=dummy, folder=args.out)
    return Setting(
        ranks=args.ranks or max(2, devices),
        devices=devices,
        model=model,
        dummy=dummy,
        cases=args.cases,
        prompts=args.prompts_per_rank,
        decode_tokens=args.decode_tokens,
        buckets=args.prefill_buckets,
        parity=args.tokens,
        mem_fraction=args.mem_fraction or None,
        several=min(args.at_a_time, len(variants)) > 1,
    )


def gpu_memory(engine: EngineProcess) -> list[float]:
    """GiB that an engine's processes take, GPU by GPU; none where the driver does not say."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    pids, found = engine.process.pids(), dict[str, float]()
    for line in done.stdout.splitlines():
        gpu, pid, used = (word.strip() for word in line.split(","))
        if pid.isdigit() and int(pid) in pids and used.isdigit():
            found[gpu] = found.get(gpu, 0.0) + int(used) / 1024
    return [round(used, 1) for _, used in sorted(found.items())]


def main() -> int:
    """Run; the exit code is 1 where no variant was measured."""
    args, variants = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that engines end with it
    end = time.monotonic() + args.time_limit
    devices = 0
    if args.device == "cuda":
        import torch

        devices = torch.cuda.device_count()
        if not devices:
            sys.stderr.write("engines.py: error: there is no GPU; --device cpu runs SGLang's CPU engine\n")
            return 2
    setting = setting_of(args, variants, devices)
    log = (args.out / "progress.txt").open("w")
    begin = time.monotonic()

    def say(text: str) -> None:
        line = f"{time.monotonic() - begin:6.1f} s  {text}\n"
        for stream in (sys.stdout, log):
            stream.write(line)
            stream.flush()

    def start(variant: Variant, index: int) -> Engine:
        options = engine_options(variant, setting)
        folder = args.out / variant.name
        folder.mkdir(exist_ok=True)
        variables = environment(
            variant.kind,
            ranks=setting.ranks,
            devices=devices,
            several=setting.several,
            made=not args.model,
            folder=folder,
            base=os.environ,
        )
        variables |= variant.environment
        return EngineProcess(variant.name, options, variables, folder, index=index, routed=variant.routed)

    def of_engine(engine: Engine) -> dict[str, Any]:
        assert isinstance(engine, EngineProcess)
        return {"memory_gib": gpu_memory(engine), "untuned": engine.process.untuned()}

    about: dict[str, Any] = {"machine": machine(), "ranks": setting.ranks, "devices": devices}
    about |= {"command": sys.argv[1:], "prompts_per_rank": setting.prompts, "decode_tokens": setting.decode_tokens}

    def save(result: Result) -> None:
        answers = result.get("answers")
        small = {key: value for key, value in result.items() if key != "answers"}
        for name, content in (("results.json", about | small), ("answers.json", answers)):
            if content is not None:
                partial = args.out / f"{name}.partial"
                partial.write_text(json.dumps(content, indent=1 if name == "results.json" else None) + "\n")
                partial.replace(args.out / name)

    turns = Turns(setting, start, of_engine, save, say, repeats=args.repeats, start_s=args.start_limit, end=end)
    result = turns.run(variants, args.at_a_time)
    text = markdown(result)
    (args.out / "table.md").write_text(text)
    sys.stdout.write("\n" + text)
    log.close()
    return 0 if any("error" not in variant for variant in result["variants"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
