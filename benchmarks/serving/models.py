"""The checkpoint of a comparison: given, or made once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from benchmarks.serving.errors import ScenarioError
from benchmarks.serving.scenario import Model


def cache_folder() -> Path:
    """Where made checkpoints are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-dwdp" / "checkpoints"


def prepare(model: Model, say: Callable[[str], None], cache: Path | None = None) -> str:
    """The path or hub name that servers get as --model-path; makes the checkpoint where the scenario asks for one.

    Who asks for the same checkpoint meanwhile waits until it is made.
    """
    if not model.make:
        return model.path
    key = hashlib.sha256(json.dumps(dict(model.make), sort_keys=True).encode()).hexdigest()[:16]
    folder = (cache or cache_folder()) / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").is_file():
            _make(model, folder, say)
    return str(folder)


def _make(model: Model, folder: Path, say: Callable[[str], None]) -> None:
    import torch

    from sglang_dwdp.demo.checkpoint import make_checkpoint

    say(f"making a random checkpoint in {folder}")
    start = time.monotonic()
    settings = dict(model.make)
    dtype = getattr(torch, settings.pop("dtype", "bfloat16"))
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        settings.pop("family", None)  # read.py has checked it
        make_checkpoint(partial, dtype=dtype, **settings)
        partial.rename(folder)
    except ValueError as error:
        raise ScenarioError(f"model.make cannot work: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"made it in {time.monotonic() - start:.0f} s")


def vocabulary_size(path: str) -> int:
    """Token ids of the model, from config.json; 4096 for a name on the hub, whose models all have more."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return 4096
    data = json.loads(config.read_text())
    size = data.get("vocab_size") or data.get("text_config", {}).get("vocab_size") or 4096
    return int(size)
