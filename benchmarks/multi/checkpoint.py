"""The checkpoint of part c: given, or made by a process of its own while the other parts run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import session, tail
from benchmarks.qwen3_layers import MADE

# Qwen3-30B-A3B's, 16 of its 48 layers: 20 GB.
GPU_SHAPE: dict[str, Any] = MADE | {"num_layers": 16, "max_positions": 32768, "num_files": 8}
CPU_SHAPE: dict[str, Any] = {"family": "qwen3_moe", "dtype": "float32", "num_layers": 2, "num_experts": 12}


class Checkpoint:
    """A checkpoint that may still be in the making."""

    def __init__(self, path: str, out: Path | None = None, log: Path | None = None, process: Any = None) -> None:
        self._path, self._out, self._log, self._process = path, out, log, process

    def path(self, timeout_s: float) -> str:
        """The folder, once it is made.

        Raises:
            RuntimeError: it was not made in time, or making it failed.
        """
        if self._process is None:
            return self._path
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._process.poll() != 0 or self._out is None or self._log is None:
            assert self._log is not None
            last = "\n".join(tail(self._log, 5))
            raise RuntimeError(f"the checkpoint was not made within {timeout_s:.0f} s: {last}")
        return self._out.read_text()


@contextmanager
def checkpoint(given: str | None, script: Path, logs: Path, *, cpu: bool) -> Iterator[Checkpoint]:
    """`given`, or the one of this machine's size, made on first use and kept."""
    if given:
        yield Checkpoint(given)
        return
    out, log = logs / "checkpoint_path.txt", logs / "checkpoint.log"
    out.unlink(missing_ok=True)
    shape = CPU_SHAPE if cpu else GPU_SHAPE
    command = [sys.executable, str(script), "--make-checkpoint", json.dumps([shape, str(out)])]
    # Every core draws tensors of its own, with one thread each.
    with session(command, log, {"OMP_NUM_THREADS": "1"}) as process:
        yield Checkpoint("", out, log, process)


def make(spec: str) -> None:
    """In the process. spec: JSON of the shape and the file that gets the folder's name."""
    from benchmarks.serving.models import prepare
    from benchmarks.serving.scenario import Model

    shape, out = json.loads(spec)
    os.nice(5)  # beside measurements
    Path(out).write_text(prepare(Model(make=shape), print))
