"""The built-in models: ``config.json`` fields of well-known checkpoints, from ``models.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_dwdp.planner.checks import read_mapping

ALIASES: dict[str, str] = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-r1-0528": "deepseek-v3",
    "qwen3-235b": "qwen3-235b-a22b",
    "qwen3-30b": "qwen3-30b-a3b",
    "mixtral": "mixtral-8x7b",
    "kimi-k2-instruct": "kimi-k2",
}


def _read() -> dict[str, dict[str, Any]]:
    found = read_mapping(Path(__file__).with_name("models.yaml"), "built-in models", yaml=True)
    for config in found.values():
        if config["model_type"] == "gpt_oss":
            config["layer_types"] = ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2)
    return found


BUILTIN_CONFIGS = _read()
