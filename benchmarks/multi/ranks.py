"""Parts that need no SGLang: a process for each rank, which meet by this package's own exchange."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import session, tail

EXCHANGE_S = 120.0  # longest wait for a peer: its first compilation lies between two meetings


@dataclass(frozen=True, slots=True)
class Job:
    """What one rank's process is told. devices: GPUs that the ranks take in turn."""

    part: str
    rank: int
    ranks: int
    devices: int
    name: str
    out: str


def run_part(part: str, ranks: int, devices: int, script: Path, logs: Path, timeout_s: float) -> dict[str, Any]:
    """The result of all ranks; with `error` and the end of a log where they did not come to the end."""
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "result.json"
        name = uuid.uuid4().hex
        jobs = [Job(part, rank, ranks, devices, name, str(out)) for rank in range(ranks)]
        files = {rank: logs / f"{part}_{rank}.log" for rank in range(ranks)}
        running = {
            job.rank: stack.enter_context(
                session([sys.executable, str(script), "--job", json.dumps(asdict(job))], files[job.rank], {})
            )
            for job in jobs
        }
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in running.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        codes = {rank: process.poll() for rank, process in running.items()}
        result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        late = [rank for rank, code in codes.items() if code is None]
        failed = [rank for rank, code in codes.items() if code]
        if late or failed:
            why = f"ranks {failed} failed" if failed else f"not done within {timeout_s:.0f} s"
            result |= {"error": why, "log": tail(files[(failed or late)[0]])}
        return result


def work(job: Job) -> None:
    """One rank, in its process. Rank 0 writes the result, and what there is of it time and again."""
    from benchmarks.multi import copies, reads
    from benchmarks.multi.bench import GpuBench
    from benchmarks.multi.experts import Shape
    from sglang_dwdp.memory.handshake import Exchange

    def save(result: dict[str, Any]) -> None:
        if job.rank == 0:
            partial = Path(job.out + ".partial")
            partial.write_text(json.dumps(result))
            os.replace(partial, job.out)

    bench = GpuBench(job.rank % job.devices)
    exchange = Exchange(job.name, job.rank, job.ranks, EXCHANGE_S)
    try:
        if job.part == "copies":
            save(copies.work(bench, exchange, Shape(), save, job.devices))
        else:
            save(reads.work(bench, exchange, Shape(), save))
    except Exception as error:
        exchange.fail(f"rank {job.rank}: {error!r}")
        raise
    finally:
        exchange.close()
