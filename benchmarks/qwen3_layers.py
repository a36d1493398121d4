"""The checkpoint of the one-GPU comparisons: eight layers of Qwen3-30B-A3B's shape, random weights, bf16."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.serving.models import prepare
from benchmarks.serving.scenario import Model

MADE: dict[str, Any] = {  # the serving scenarios' too, so that one checkpoint serves both
    "family": "qwen3_moe",
    "dtype": "bfloat16",
    "num_layers": 8,
    "num_experts": 128,
    "top_k": 8,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_heads": 32,
    "num_kv_heads": 4,
    "head_dim": 128,
    "max_positions": 16384,
}


def model_path(given: str | None) -> str:
    """The folder that the user named, or that of the checkpoint, made on first use (10 GB) and kept."""
    return given or prepare(Model(make=MADE), print)
