"""Copies, direct reads, servers and the crossover on all GPUs of this machine: python benchmarks/multi_gpu.py

Parts: `copies` and `reads` need torch, Triton, cuda-bindings and this package; `servers` needs SGLang. The JSON is
written after every part. With one GPU its ranks share it, and with --cpu servers run on SGLang's CPU engine: such runs
prove that the code works, and their figures say nothing about several GPUs. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.multi.ranks import Job, run_part, work

PARTS = ("copies", "reads", "servers")
PART_S = {"copies": 110.0, "reads": 110.0}  # longest time of a part


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, help="default: one for each GPU; two on one GPU or on the CPU")
    parser.add_argument("--cpu", action="store_true", help="servers on SGLang's CPU engine, nothing else")
    parser.add_argument("--out", type=Path, default=Path("multi_gpu.json"))
    parser.add_argument("--logs", type=Path, default=Path("multi_gpu_logs"))
    parser.add_argument("--time-limit", type=float, default=510, help="seconds after which nothing new is begun")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def topology() -> list[str]:
    """How the GPUs are linked, in nvidia-smi's words."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def main() -> None:
    """Run the parts; print the tables, write the JSON."""
    args = parse()
    if args.job:
        work(Job(**json.loads(args.job)))
        return
    import torch
    from rich.console import Console

    from benchmarks.multi import show
    from benchmarks.serving.machine import machine

    end = time.monotonic() + args.time_limit
    console = Console(width=150)
    devices = 0 if args.cpu else torch.cuda.device_count()
    ranks = args.ranks or max(2, devices)
    args.logs.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "topology": topology() if devices else []}
    report: dict[str, Any] = {**about, "devices": devices, "ranks": ranks, "parts": {}, "targets": []}
    targets: list[show.Target] = []

    def save() -> None:
        report["targets"] = [target.to_json() for target in targets]
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    for part in args.parts:
        left = end - time.monotonic()
        if part != "servers":
            if not devices:
                report["parts"][part] = {"not_run": "it needs GPUs"}
            elif left < 30:
                report["parts"][part] = {"not_run": "no time left"}
            else:
                console.print(f"{part} …")
                begin = time.monotonic()
                script = Path(__file__).resolve()
                found = run_part(part, ranks, devices, script, args.logs, min(PART_S[part], left))
                report["parts"][part] = found | {"seconds": time.monotonic() - begin}
        save()
    for part in args.parts:
        found = report["parts"].get(part, {})
        if "not_run" in found:
            console.print(f"{part}: not run, {found['not_run']}")
            continue
        if part == "copies":
            targets += show.copy_targets(found)
            console.print(show.reference_table(found), show.copy_table(found))
            right = found.get("direct_is_right"), found.get("staged_is_right")
            console.print(f"views are bitwise the owners' experts: direct {right[0]}, staged {right[1]}")
        elif part == "reads":
            console.print(show.read_table(found))
            console.print(show.planned_read_line(found))
        if "error" in found:
            console.print(f"{part}: {found['error']}\n" + "\n".join(found.get("log", ())), markup=False)
    console.print(show.target_table(targets))
    save()


if __name__ == "__main__":
    main()
