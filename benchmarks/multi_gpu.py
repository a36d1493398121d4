"""Copies, direct reads, servers and the crossover on all GPUs of this machine: python benchmarks/multi_gpu.py

Parts: `copies` and `reads` need torch, Triton, cuda-bindings and this package; `servers` needs SGLang. The JSON is
written after every part, and after every workload of the servers. With one GPU its ranks share it, and with --cpu
servers run on SGLang's CPU engine: such runs prove that the code works, and their figures say nothing about several
GPUs. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.multi import variants
from benchmarks.multi.checkpoint import Checkpoint, checkpoint, make
from benchmarks.multi.ranks import Job, run_part, work

PARTS = ("copies", "reads", "servers")
PART_S = {"copies": 110.0, "reads": 110.0}  # longest time of a part
LEAST_S = 30.0  # a part is not begun with less time left
SCRIPT = Path(__file__).resolve()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; with --cpu servers alone")
    parser.add_argument(
        "--variants", nargs="+", choices=variants.VARIANTS, help="default: " + " ".join(variants.DEFAULT)
    )
    parser.add_argument("--ranks", type=int, help="default: one for each GPU; two on one GPU or on the CPU")
    parser.add_argument("--cpu", action="store_true", help="servers on SGLang's CPU engine, nothing else")
    parser.add_argument("--model", help="a checkpoint folder; default: 16 layers of Qwen3-30B-A3B's shape, made")
    parser.add_argument("--attention-backend", default="triton", help="of all variants")
    parser.add_argument("--out", type=Path, default=Path("multi_gpu.json"), help="the plot goes beside it, as PNG")
    parser.add_argument("--logs", type=Path, default=Path("multi_gpu_logs"))
    parser.add_argument("--time-limit", type=float, default=500, help="seconds after which nothing new is begun")
    parser.add_argument(
        "--start-limit", type=float, help="seconds for all engines to start (default: 240; 400 on the CPU)"
    )
    for hidden in ("--job", "--engine", "--make-checkpoint"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--connection", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ranks is not None and args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: there is nothing to share with fewer than 2 ranks")
    args.parts = args.parts or (["servers"] if args.cpu else list(PARTS))
    try:
        for folder in (args.logs, args.out.parent):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"results cannot be written: {error}")
    return args


class Run:
    """One run of the script: what it was asked for, and the report as it grows."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from rich.console import Console

        from benchmarks.machine import machine

        self.args = args
        self.end = time.monotonic() + args.time_limit
        self.console = Console(width=150)
        self.devices = 0 if args.cpu else torch.cuda.device_count()
        self.ranks = args.ranks or max(2, self.devices)
        self.report: dict[str, Any] = {
            "machine": machine(),
            "topology": topology() if self.devices else [],
            "devices": self.devices,
            "ranks": self.ranks,
            "parts": {},
            "targets": [],
        }

    def save(self) -> None:
        """Write the JSON, whole or not at all."""
        partial = self.args.out.with_name(self.args.out.name + ".partial")
        partial.write_text(json.dumps(self.report, indent=1) + "\n")
        os.replace(partial, self.args.out)

    def part(self, part: str, model: Checkpoint | None) -> dict[str, Any]:
        """Run one part; its result, or why it was not run."""
        if part != "servers" and not self.devices:
            return {"not_run": "it needs GPUs"}
        if part == "servers" and not self.devices and not self.args.cpu:
            return {"not_run": "there is no GPU; --cpu runs it on SGLang's CPU engine"}
        left = self.end - time.monotonic()
        if left < LEAST_S:
            return {"not_run": "no time left"}
        if part != "servers":
            return run_part(part, self.ranks, self.devices, SCRIPT, self.args.logs, min(PART_S[part], left))
        assert model is not None
        try:
            return self._servers(model.path(left - LEAST_S))
        except RuntimeError as error:
            return {"not_run": str(error)}

    def _servers(self, model: str) -> dict[str, Any]:
        from benchmarks.multi import crossover
        from benchmarks.multi.servers import Comparison, Setting

        args = self.args
        setting = Setting(
            tuple(args.variants or (variants.DEFAULT if self.devices else variants.ON_CPU)),
            self.ranks,
            self.devices,
            model,
            args.attention_backend,
            args.start_limit or (240.0 if self.devices else 400.0),
            self.end,
            SCRIPT,
            args.logs,
        )

        def keep(result: dict[str, Any]) -> None:
            self.report["parts"]["servers"] = result
            self.save()

        result = Comparison(setting, self.console.print, keep).run()
        result["crossover"] = crossover.find(result, model, self._device_name(), self.ranks)
        return result

    def _device_name(self) -> str | None:
        gpus = self.report["machine"]["gpus"]
        return gpus[0].split(",")[0] if self.devices and gpus else None

    def show(self) -> None:
        """The tables, and at the end the targets."""
        from benchmarks.multi import show, show_servers

        targets: list[show.Target] = []
        say = self.console.print
        for part, found in self.report["parts"].items():
            if "not_run" in found:
                say(f"{part}: not run: {found['not_run']}", markup=False)
            elif part == "copies":
                targets += show.copy_targets(found)
                say(show.reference_table(found), show.copy_table(found))
                right = found.get("direct_is_right"), found.get("staged_is_right")
                say(f"views are bitwise the owners' experts: direct {right[0]}, staged {right[1]}")
            elif part == "reads":
                say(show.read_table(found), show.planned_read_line(found))
            elif "crossover" in found:
                if found["tokens"]:
                    say(show_servers.rate_table(found), show_servers.token_table(found))
                    say(show_servers.crossover_table(found["crossover"]))
                targets += show_servers.server_targets(found, found["crossover"])
                picture = self.args.out.with_suffix(".png")
                if show_servers.plot(found, found["crossover"], picture):
                    say(f"plot: {picture}")
                for name, one in found["variants"].items():
                    self._trouble(name, one)
                for note in found["notes"]:
                    say(note, markup=False)
            self._trouble(part, found)
        self.report["targets"] = [target.to_json() for target in targets]
        self.save()
        if targets:
            say(show.target_table(targets))

    def _trouble(self, name: str, found: dict[str, Any]) -> None:
        if "error" in found:
            lines = "\n  ".join((found["error"], *found.get("log", ())[-12:]))
            self.console.print(f"{name}: {lines}", markup=False)


def topology() -> list[str]:
    """How the GPUs are linked, in nvidia-smi's words."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def trouble(found: Mapping[str, Any]) -> bool:
    """Whether a part failed or was not run, none of its servers started, or memory was not bitwise the owners'."""
    engines = found.get("variants", {}).values()
    compared = [found[name] for name in ("direct_is_right", "staged_is_right") if name in found]
    compared += [mine["same"] for row in found.get("rows", ()) for mine in row["by_rank"] if "same" in mine]
    broken = "error" in found or "not_run" in found
    return broken or (bool(engines) and all("error" in one for one in engines)) or not all(compared)


def main() -> None:
    """Run the parts; print the tables, write the JSON and the plot. Exit code 1 where one is in trouble."""
    args = parse()
    if args.job:
        work(Job(**json.loads(args.job)))
        return
    if args.make_checkpoint:
        make(args.make_checkpoint)
        return
    if args.engine:
        from benchmarks.multi.servers import serve

        serve(args.engine, args.connection)
        return
    run = Run(args)
    with ExitStack() as stack:
        model = None
        if "servers" in args.parts and (run.devices or args.cpu):
            model = stack.enter_context(checkpoint(args.model, SCRIPT, args.logs, cpu=not run.devices))
        for part in args.parts:
            run.console.print(f"{part} …")
            begin = time.monotonic()
            try:
                found = run.part(part, model)
            except Exception as error:  # noqa: BLE001  (no part may take the others with it)
                log = traceback.format_exc().splitlines()
                found = run.report["parts"].get(part, {}) | {"error": repr(error), "log": log}
            run.report["parts"][part] = found | {"seconds": round(time.monotonic() - begin, 1)}
            run.save()
    run.show()
    failed = [part for part, found in run.report["parts"].items() if trouble(found)]
    if failed:
        run.console.print(f"not as it should be: {', '.join(failed)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
