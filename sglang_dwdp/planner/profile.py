"""A measured profile: rates of one machine's GPUs, and how they replace the defaults."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import PlannerError
from .gpus import Gpu

FORMAT_VERSION = 1


@dataclass(frozen=True)
class GemmPoint:
    """One product: ``rows`` in all over ``experts`` matrices of [depth, width], bf16; seconds."""

    rows: int
    experts: int
    depth: int
    width: int
    seconds: float


@dataclass(frozen=True)
class AttentionPoint:
    """Causal attention over one sequence, bf16; seconds."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    seconds: float


@dataclass(frozen=True)
class SmallPoint:
    """All small kernels of one PyTorch layer: bytes read and written, launches, seconds."""

    tokens: int
    counted_bytes: float
    kernels: int
    seconds: float


ALL_PEERS = -1


@dataclass(frozen=True)
class CopyPoint:
    """What GPU ``device`` copies from ``peer``: bytes/s, alone and while it computes.

    Attributes:
        peer: the source; ``ALL_PEERS`` for all others at once; ``device`` itself for a copy within
            the GPU, which says nothing of the link.
        alone, under_compute: bytes/s.
        compute_slowdown: by which factor the copy slows products down meanwhile.
    """

    peer: int
    alone: float
    under_compute: float
    compute_slowdown: float
    device: int = 0

    @property
    def crosses_link(self) -> bool:
        """Whether the bytes come from another GPU."""
        return self.peer != self.device


@dataclass(frozen=True)
class Profile:
    """What was measured, and where."""

    gpu: str
    device: str
    torch: str
    model: str
    grouped: tuple[GemmPoint, ...] = ()
    dense: tuple[GemmPoint, ...] = ()
    sustained: tuple[GemmPoint, ...] = ()
    attention: tuple[AttentionPoint, ...] = ()
    small: tuple[SmallPoint, ...] = ()
    copies: tuple[CopyPoint, ...] = ()
    version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def apply(self, gpu: Gpu) -> Gpu:
        """``gpu`` with everything that was measured in place of the defaults.

        Raises:
            PlannerError: if the profile was taken on another GPU.
        """
        if self.gpu.lower() not in ("unknown", gpu.name.lower()):
            raise PlannerError(f"the profile was measured on {self.gpu}, not on {gpu.name}")
        from .fit import fit

        return fit(self, gpu)


def load_profile(path: str) -> Profile:
    """Read what ``sglang-dwdp profile`` wrote.

    Raises:
        PlannerError: if the file is missing, no JSON, or of another version.
    """
    file = Path(path)
    if not file.is_file():
        raise PlannerError(f"profile {path} does not exist; make one with `sglang-dwdp profile -o {path}`")
    try:
        data = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise PlannerError(f"profile {path} is not valid JSON: {error}") from None
    if not isinstance(data, dict) or data.get("version") != FORMAT_VERSION:
        raise PlannerError(f"{path} is no profile of version {FORMAT_VERSION}; measure it again")
    kinds = {
        "grouped": GemmPoint,
        "dense": GemmPoint,
        "sustained": GemmPoint,
        "attention": AttentionPoint,
        "small": SmallPoint,
        "copies": CopyPoint,
    }
    try:
        points: dict[str, Any] = {name: tuple(kind(**p) for p in data.pop(name, ())) for name, kind in kinds.items()}
        return Profile(**data, **points)
    except TypeError as error:
        raise PlannerError(f"profile {path} is malformed: {error}") from None
