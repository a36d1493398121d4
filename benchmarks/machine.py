"""What figures were measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def machine() -> dict[str, Any]:
    """Python, cores, GPUs with their driver, and versions of the packages that matter."""
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "gpus": []}
    for package in ("sglang", "sglang-dwdp", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")
        found["gpus"] = [line for line in lines if line]
    return found
