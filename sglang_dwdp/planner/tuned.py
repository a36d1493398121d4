"""Which experts SGLang has tuned Triton kernels for, by the files that come with it.

The planner's times come from tuned kernels. Without, forwards took 1.3 to 1.4 times as long where that was measured
(two H200, 256 experts of Qwen3-30B-A3B's width; docs/performance.md).
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from sglang_dwdp.planner.cost import Group
from sglang_dwdp.planner.gpus import Gpu
from sglang_dwdp.planner.shape import ModelShape

CONFIGS = "srt/layers/moe/moe_runner/triton_utils/configs"


def sglang_folder() -> Path | None:
    """Where SGLang is installed, if it is; it is not imported."""
    found = find_spec("sglang")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def device_pattern(gpu: Gpu) -> str:
    """A regular expression for the part of a file's name that says which GPU it is for."""
    return rf"device_name=NVIDIA_{re.escape(gpu.name)}(?:_\d+GB_HBM3)?"


def untuned_notes(model: ModelShape, gpu: Gpu, expert_format: str, group: Group, sglang: Path | None) -> list[str]:
    """What is slower than planned for want of tuned kernels.

    Args:
        model: Whose experts.
        gpu: Only Hopper's are known to run Triton by default, and only in bf16.
        expert_format: By name.
        group: DEP, and DWDP's forwards that ranks run together, divide the experts by its size.
        sglang: Its folder; None if it is not installed here.

    Returns:
        A sentence for each number of experts without a tuned configuration.
    """
    if sglang is None or not gpu.gathered_rows or expert_format != "bf16":
        return []
    files = [file.name for file in (sglang / CONFIGS).glob("*/E=*.json")]
    if not files:  # another release may have them elsewhere
        return []
    runs = (("DWDP and replicas", model.experts), ("DEP and joint forwards", model.experts // group.size))
    width, device = model.moe_intermediate, device_pattern(gpu)
    return [
        f"SGLang has no tuned Triton kernels for {count} experts of {width} on {gpu.name}, so {who} will be slower "
        "than planned: tune them, or see `sglang-dwdp kernels`."
        for who, count in runs
        if not any(re.fullmatch(rf"E={count},N={width},{device}\.json", name) for name in files)
    ]
