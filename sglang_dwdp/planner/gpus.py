"""The GPUs that the planner knows, how users and drivers call them, and files with measured figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_dwdp.planner.checks import read_mapping
from sglang_dwdp.planner.errors import PlannerError
from sglang_dwdp.planner.gpu import Efficiency, Gpu


def _gpu(data: dict[str, Any], what: str) -> Gpu:
    fields = dict(data)
    efficiency = fields.pop("efficiency", {})
    try:
        return Gpu(**fields, efficiency=Efficiency(**efficiency))
    except (PlannerError, TypeError) as error:
        raise PlannerError(f"{what}: {error}") from None


_KNOWN = read_mapping(Path(__file__).with_name("gpus.yaml"), "built-in GPUs", yaml=True)
GPUS: dict[str, Gpu] = {name: _gpu(data, name) for name, data in _KNOWN.items()}


def get_gpu(name: str) -> Gpu:
    """The GPU called ``name``, or as its driver calls it; case does not matter.

    Raises:
        PlannerError: for an unknown name, with the known ones.
    """
    found = gpu_of_device(name.replace("_", " "))
    if found is None:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise PlannerError(
            f"unknown GPU {name!r}; known: {known}. For another GPU name the closest and give what differs in a "
            "--gpu-file (docs/planner.md)."
        )
    return found


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that a driver calls ``device_name`` ("NVIDIA H100 80GB HBM3"), None where it is not known.

    Boards with another link (H100 PCIe, H100 NVL), parts of a GPU (MIG), and chips that merely have a known one's
    letters in their name (GH200) are other GPUs.
    """
    words = set(device_name.upper().replace("-", " ").split())
    if words & {"PCIE", "NVL", "MIG"}:
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name in words), None)


def with_file(gpu: Gpu, path: str) -> Gpu:
    """``gpu`` with the figures of a YAML or JSON file in place of its own.

    Args:
        path: a mapping of fields of ``Gpu``, as ``gpus.yaml`` has them; what it does not say stays.

    Raises:
        PlannerError: if the file is missing or malformed, or names an unknown field.
    """
    data = read_mapping(Path(path), "GPU file", yaml=True)
    base = asdict(gpu)
    sources = dict(gpu.sources)
    for key in data.keys() - {"name", "sources"}:
        sources[key] = f"{path}; what it does not say: {sources.get(key)}" if isinstance(data[key], dict) else path
    for part in ("efficiency", "peak_flops"):
        if not isinstance(data.get(part, {}), dict):
            raise PlannerError(f"GPU file {path}: {part} must be a mapping")
        data[part] = base[part] | data.get(part, {})
    return _gpu(base | data | {"sources": sources | dict(data.get("sources") or {})}, f"GPU file {path}")
