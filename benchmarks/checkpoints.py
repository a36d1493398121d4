"""Checkpoints of benchmarks: given, made once and kept, or only a config.json for which SGLang draws the weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

# Qwen3-30B-A3B's, as `make_checkpoint` takes them.
QWEN3 = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_heads": 32,
    "num_kv_heads": 4,
    "head_dim": 128,
    "top_k": 8,
    "max_positions": 40960,
}


def cache_folder() -> Path:
    """Where made checkpoints are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-dwdp" / "checkpoints"


def make(settings: Mapping[str, Any]) -> str:
    """The folder of a random checkpoint. Whoever asks for the same one meanwhile waits until it is made.

    Args:
        settings: `dtype` (a name of torch's), and the other arguments of `make_checkpoint`.

    Raises:
        ValueError: No checkpoint can have these settings.
    """
    import torch

    from sglang_dwdp.demo.checkpoint import make_checkpoint

    key = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():
            return str(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
        shape = {"dtype": "bfloat16", **settings}
        try:
            make_checkpoint(partial, dtype=getattr(torch, shape.pop("dtype")), **shape)
        except TypeError as error:
            raise ValueError(f"model.make: {error}") from None
        partial.rename(folder)
    return str(folder)


def qwen3(layers: int | None, experts: int | None, *, small: bool, dummy: bool, folder: Path) -> str:
    """The folder of a checkpoint of Qwen3-30B-A3B's shape, or of a small one of its kind.

    Args:
        layers: 12 by default, 2 where it is small.
        experts: Of each layer; 128 by default, 12 where it is small.
        small: For the CPU engine; float32.
        dummy: Write config.json alone.
        folder: Where that goes.
    """
    if small:
        return make({"dtype": "float32", "num_layers": layers or 2, "num_experts": experts or 12})
    sizes = QWEN3 | {"num_layers": layers or 12, "num_experts": experts or 128}
    if not dummy:
        return make(sizes)
    from transformers import Qwen3MoeConfig

    model = folder / "model"
    names = {"num_layers": "num_hidden_layers", "max_positions": "max_position_embeddings"}
    names |= {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "top_k": "num_experts_per_tok"}
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        vocab_size=2048,
        intermediate_size=6144,
        norm_topk_prob=True,
        rope_theta=1000000.0,
        bos_token_id=1,
        eos_token_id=0,
        **{names.get(name, name): size for name, size in sizes.items()},
    ).save_pretrained(model)
    return str(model)
