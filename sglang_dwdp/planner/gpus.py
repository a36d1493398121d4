"""What the cost model wants to know of a GPU, the GPUs that the planner knows, and files with measured figures.

Peaks are dense (no structured sparsity). `link_bandwidth` counts one direction. `gpus.yaml` has the known GPUs; a
`--gpu-file` replaces any of these figures by measured ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from sglang_dwdp.planner.checks import AtLeastOne, Count, NotNegative, PlannerError, Positive, checked, read_mapping
from sglang_dwdp.planner.formats import WeightFormat

Fraction = Annotated[float, Field(gt=0, le=1)]
_FIELDS = ConfigDict(extra="forbid")


@checked
@dataclass(frozen=True, config=_FIELDS)
class Efficiency:
    """Fractions of peak that kernels reach, and what limits small problems.

    Attributes:
        grouped_gemm, dense_gemm, attention: fraction of the matrix peak, for large problems.
        elementwise: fraction of HBM bandwidth reached by norms, activations, permutations.
        weight_read: fraction of HBM bandwidth reached by a product bound by reading weights.
        collective: fraction of link bandwidth reached by all-to-all, all-gather, reduce-scatter.
        tile_rows: rows that a grouped product is padded to; half of it is lost per expert.
        half_depth: inner dimension at which a grouped product reaches half of its rate (pipeline fill).
        gemm_cap: fraction of the matrix peak that long large products sustain within the power limit.
        gemm_latency: seconds that every product costs whatever its size.
        overlap_power: p in (compute^p + memory^p)^(1/p), how well a product's weight reads hide under its arithmetic;
            infinite for the plain maximum.
    """

    grouped_gemm: Fraction
    dense_gemm: Fraction
    attention: Fraction
    elementwise: Fraction
    weight_read: Fraction = 0.85
    collective: Fraction = 0.75
    tile_rows: Count = 128
    half_depth: NotNegative = 0.0
    gemm_cap: Fraction = 1.0
    gemm_latency: NotNegative = 0.0
    overlap_power: Annotated[float, Field(ge=1)] = float("inf")


@checked
@dataclass(frozen=True, config=_FIELDS)
class Gpu:
    """One GPU model.

    Attributes:
        memory: bytes of HBM that a process can use.
        hbm_bandwidth: bytes/s.
        peak_flops: FLOP/s by compute format (`bf16`, `fp8`, `fp4`).
        link_bandwidth: bytes/s to all peers together, one direction, data sheet.
        copy_bandwidth: bytes/s that copy engines pull from several peers together.
        pair_bandwidth: bytes/s that they pull from one peer.
        switched: peers share each GPU's port through a switch (a busy source slows its readers); otherwise every pair
            has its own wire.
        copy_interference: seconds of compute lost per second of copying under it.
        expert_skew: how much experts' loads vary, as a fraction of the most that top-k routing permits (0: evenly
            loaded, as EPLB strives for); under DEP it explains the wait for the slowest rank that sequence lengths do
            not. A property of model and traffic more than of the GPU; it stands here because Table 1 is its one source.
        kernel_gap: seconds between dependent kernels.
        max_group: GPUs that the links join.
        gathered_rows: after an all-gather SGLang's default expert kernels write and sum rows of other ranks' experts
            too (Triton).
        sources: where each figure comes from.
    """

    name: str
    memory: Positive
    hbm_bandwidth: Positive
    peak_flops: Mapping[str, Positive]
    link_bandwidth: Positive
    copy_bandwidth: Positive
    pair_bandwidth: Positive
    efficiency: Efficiency
    max_group: AtLeastOne
    switched: bool = True
    copy_interference: NotNegative = 0.0
    expert_skew: NotNegative = 0.0
    kernel_gap: NotNegative = 2e-6
    gathered_rows: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)

    def peak(self, fmt: WeightFormat) -> float:
        """FLOP/s at which weights of `fmt` are multiplied, before efficiency."""
        if fmt.compute in self.peak_flops:
            return self.peak_flops[fmt.compute]
        if fmt.weight_only or fmt.compute == "bf16":
            return self.peak_flops["bf16"]
        raise PlannerError(f"{self.name} has no {fmt.compute} matrix units for weights in {fmt.name}")


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
    """The GPU called `name`, or as its driver calls it ("NVIDIA H100 80GB HBM3"); case does not matter.

    Boards with another link (H100 PCIe, H100 NVL), parts of a GPU (MIG), and chips that merely have a known one's
    letters in their name (GH200) are other GPUs.

    Raises:
        PlannerError: for an unknown name, with the known ones.
    """
    words = set(name.upper().replace("-", " ").replace("_", " ").split())
    found = next((gpu for gpu in GPUS.values() if gpu.name in words), None)
    if found is None or words & {"PCIE", "NVL", "MIG"}:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise PlannerError(
            f"unknown GPU {name!r}; known: {known}. For another GPU name the closest and give what differs in a "
            "--gpu-file (docs/planner.md)."
        )
    return found


def with_file(gpu: Gpu, path: str) -> Gpu:
    """`gpu` with the figures of a YAML or JSON file in place of its own.

    Args:
        path: a mapping of fields of `Gpu`, as `gpus.yaml` has them; what it does not say stays.

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
