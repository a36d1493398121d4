"""Copies and direct reads between all GPUs of this machine: python benchmarks/gpu_links.py [--out FILE]

A process for each rank shares one layer of Qwen3-30B-A3B's experts as a server does. Copies: each pair one way and both
ways, then all at once by slices, alone and beside a matrix product, against torch's own copy of a GiB. Reads: a grouped
product on the peers' experts in place, all ranks at once, against resident experts. Both are checked bit by bit. With
one GPU the ranks share it, and with --cpu they have none: such runs prove that the code works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.links import copies, reads
from benchmarks.links.device import Device, gathered
from benchmarks.links.layer import Shape, SharedLayer
from benchmarks.machine import machine
from benchmarks.processes import Process, RunError, with_repository
from benchmarks.variants import QUIET
from sglang_dwdp.memory.handshake import Exchange

EXCHANGE_S = 120.0  # longest wait for a peer: its first compilation lies between two meetings
SMALL = Shape(experts=8, hidden=64, intermediate=48, top_k=2)


def work(device: Device, exchange: Exchange, shape: Shape, out: Path) -> dict[str, Any]:
    """One rank's part; rank 0 writes what there is, time and again."""
    layer = SharedLayer(device, exchange, shape)
    result: dict[str, Any] = {"devices": gathered(exchange, device.name)}
    result["direct_is_right"] = all(gathered(exchange, layer.direct_is_right()))

    def save(part: str, found: Any) -> None:
        result[part] = found
        if exchange.rank == 0:
            out.with_suffix(".partial").write_text(json.dumps(result))
            out.with_suffix(".partial").replace(out)

    save("copies", copies.measure(device, exchange, layer, lambda found: save("copies", found)))
    save("reads", reads.measure(device, exchange, layer, shape, lambda found: save("reads", found)))
    exchange.barrier()
    layer.close()
    return result


def run_ranks(ranks: int, cpu: bool, logs: Path, timeout_s: float) -> dict[str, Any]:
    """What all ranks measured, with `error` where they did not come to the end."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        out, name = Path(folder) / "result.json", uuid.uuid4().hex
        command = [sys.executable, str(Path(__file__).resolve()), *(["--cpu"] if cpu else []), "--ranks", str(ranks)]
        processes = []
        for rank in range(ranks):
            job = [*command, "--out", str(out), "--rank", str(rank), "--group", name]
            process = Process(f"rank {rank}", job, with_repository(os.environ) | QUIET, logs / f"links_{rank}.log")
            processes.append(process)
            stack.callback(process.stop, 0)
        error = None
        while any(process.exit_code() is None for process in processes) and error is None:
            time.sleep(0.1)
            try:
                for process in processes:
                    if process.exit_code() not in (None, 0):
                        process.check_alive()
            except RunError as failed:
                error = str(failed)
            if time.monotonic() - processes[0].started > timeout_s:
                error = f"not done within {timeout_s:.0f} s"
        result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        return result | ({"error": error} if error else {})


def table(result: dict[str, Any]) -> str:
    """Markdown: the slowest rank's figures."""
    lines = ["| copies | slices | GB/s | product beside them |", "|---|---|---|---|"]
    found = result.get("copies", {})
    for row in found.get("reference", ()):
        lines.append(f"| torch, {row['reads'][0][0]} ← {row['reads'][0][1]} | – | {row['bytes_per_s'] / 1e9:.1f} | – |")
    for row in found.get("rows", ()):
        pairs = row["reads"]
        who = "all ← all peers" if pairs[0][1] < 0 else ", ".join(f"{reader} ← {source}" for reader, source in pairs)
        rate = min(value for value in row["bytes_per_s"] if value) / 1e9
        slower = f"{max(row['under_product']):.2f} x" if "under_product" in row else "–"
        slices = f"{row['slice_mib']} MiB" if row["slice_mib"] else "uncut"
        lines.append(f"| {who} | {slices} | {rate:.1f} | {slower} |")
    lines += ["", "| tokens | GB/s in place | to resident | bitwise |", "|---|---|---|---|"]
    for row in result.get("reads", {}).get("rows", ()):
        rate = min(size / seconds for size, seconds in zip(row["bytes"], row["peers_s"], strict=True)) / 1e9
        longer = max(there / here for there, here in zip(row["peers_s"], row["resident_s"], strict=True))
        same = "equal" if all(row["same"]) else "DIFFERENT"
        lines.append(f"| {row['tokens']} | {rate:.1f} | {longer:.2f} x | {same} |")
    right = result.get("direct_is_right"), found.get("staged_is_right")
    lines += ["", f"Views have the owners' experts, bit by bit: direct {right[0]}, staged {right[1]}."]
    return "\n".join([*lines, *([f"error: {result['error']}"] if "error" in result else [])]) + "\n"


def main() -> int:
    """Run; the exit code is 1 where a rank failed or a view has other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_links.json"), help="logs go beside it")
    parser.add_argument("--ranks", type=int, help="default: one for each GPU, at least two")
    parser.add_argument("--cpu", action="store_true", help="without GPUs: only that the code works")
    parser.add_argument("--time-limit", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    args = parser.parse_args()
    count = 0
    if not args.cpu:
        import torch

        count = torch.cuda.device_count()
        if not count:
            parser.error("there is no GPU; --cpu runs the same code without")
    if args.rank is not None:
        exchange = Exchange(args.group, args.rank, args.ranks, EXCHANGE_S)
        try:
            device = Device(None if args.cpu else args.rank % count)
            work(device, exchange, SMALL if args.cpu else Shape(), args.out)
        except Exception as error:
            exchange.fail(f"rank {args.rank}: {error!r}")
            raise
        finally:
            exchange.close()
        return 0
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"results cannot be written: {error}")
    result = run_ranks(args.ranks or max(2, count), args.cpu, args.out.parent, args.time_limit)
    args.out.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    sys.stdout.write(table(result))
    right = result.get("direct_is_right") and result.get("copies", {}).get("staged_is_right")
    return 0 if right and "error" not in result else 1


if __name__ == "__main__":
    sys.exit(main())
