"""SGLang's own test kits, of which each file wants a process of its own: make test-kits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sglang_dwdp.cpu import engine as cpu_engine


def pytest_configure(config: pytest.Config) -> None:
    """Where kits are asked for, before SGLang is imported."""
    if "kits" in config.option.markexpr:
        cpu_engine.arrange(2)
        # Kits start the command `sglang`.
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Otherwise leave them alone: they import SGLang's test helpers, which change its settings."""
    return True if "kits" not in config.option.markexpr and collection_path.name.startswith("test_") else None
