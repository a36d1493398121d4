"""Triton configurations for numbers of experts that SGLang has none for, made of those that it has.

SGLang looks a configuration up by the exact number of a rank's experts, and without one takes a default for all sizes.
What suits a kernel depends on the experts' width and on how many rows each expert gets. So a missing table is that of
another number of experts of that width, at as many rows an expert. Tuning can only do better.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.gpus import Gpu
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.tuned import CONFIGS, device_pattern


def write_tables(model: ModelShape, gpu: Gpu, group_size: int, sglang: Path, out: Path) -> list[str]:
    """Copy SGLang's tables to `out`, and add those that a model's bf16 experts lack.

    Args:
        model: Whose experts.
        gpu: That they run on.
        group_size: Ranks that share them; expert parallelism over as many ranks, and joint forwards, run a share.
        sglang: SGLang's folder.
        out: For SGLANG_MOE_CONFIG_DIR; it must not exist.

    Returns:
        The names of the files that were added.

    Raises:
        PlannerError: `out` exists, the experts are not bf16, the ranks cannot share them evenly, or SGLang has no
            table of this width.
    """
    if model.expert_format != "bf16":
        raise PlannerError(f"{model.name}'s experts are {model.expert_format}, and these tables are for bf16 alone")
    if model.experts % group_size:
        raise PlannerError(f"{group_size} ranks do not share {model.experts} experts evenly")
    tables = _tables(sglang, gpu, model.moe_intermediate)
    if not tables:
        raise PlannerError(
            f"SGLang has no Triton configuration for bf16 experts of width {model.moe_intermediate} on {gpu.name}, "
            "whatever their number: tune them with its benchmark/kernels/fused_moe_triton"
        )
    if out.exists():
        raise PlannerError(f"{out} exists: name a folder that does not")
    shutil.copytree(sglang / CONFIGS, out / "configs")
    added = []
    for count in sorted({model.experts, model.experts // group_size} - tables.keys()):
        source = min(tables, key=lambda other: max(other, model.experts) / min(other, model.experts))
        for file in (tables[source], tables[source].with_name(f"{tables[source].stem}_down.json")):
            if file.is_file():
                name = file.name.replace(f"E={source},", f"E={count},")
                table = _rescaled(json.loads(file.read_text()), model.experts / source)
                (out / "configs" / file.parent.name / name).write_text(json.dumps(table, indent=1) + "\n")
                added.append(name)
    return added


def _tables(sglang: Path, gpu: Gpu, width: int) -> dict[int, Path]:
    """By number of experts, the newest table of bf16 experts."""
    name = re.compile(rf"E=(\d+),N={width},{device_pattern(gpu)}\.json")
    files = sorted((sglang / CONFIGS).glob("triton_*/E=*.json"), key=lambda file: _version(file.parent.name))
    return {int(found[1]): file for file in files if (found := name.fullmatch(file.name))}


def _version(folder: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", folder)]


def _rescaled(table: dict[str, dict[str, int]], factor: float) -> dict[str, dict[str, int]]:
    """A table whose rows, the keys, are `factor` times as many: with all of a model's experts, or with a share that
    gets that part of the same rows, each expert then gets as many as those that the table was made for."""
    return {str(max(1, round(int(rows) * factor))): config for rows, config in table.items()}
