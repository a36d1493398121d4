"""Processes of a benchmark: each in a session of its own with a log, and gone with all that it started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

# NVLink multicast stays off: benchmarks share a host's fabric with others.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


@contextmanager
def session(
    command: Sequence[str], log: Path, environment: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to `log`. It and its session are killed at the end.

    environment: added to this process's.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **NO_MULTICAST, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        try:
            yield process
        finally:
            subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)  # its session, whatever is left
            process.kill()  # also where pkill is missing
            process.wait()


def tail(log: Path, lines: int = 30) -> list[str]:
    """The last lines of a log; none where there is none."""
    try:
        return log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
