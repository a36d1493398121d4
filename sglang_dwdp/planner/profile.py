"""A measured profile: rates of one machine's GPUs, and how they replace the defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checks import kinds_of_fields, number, read_json, whole
from .errors import PlannerError
from .gpu import Gpu

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
class ReadPoint:
    """A grouped product on GPU ``device`` whose weights lie in the memory of GPU ``peer``.

    Attributes:
        rows_per_expert: rows of each expert; fewer than a tile read the weights once.
        bytes_per_second: bytes of weights over the product's time.
    """

    device: int
    peer: int
    rows_per_expert: int
    bytes_per_second: float


@dataclass(frozen=True)
class Profile:
    """What was measured, and where.

    ``reads`` is empty where no GPU reaches another, or where reading in place failed: ``reads_failed`` says how.
    Figures of other measurements may be put in by hand.
    """

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
    reads: tuple[ReadPoint, ...] = ()
    reads_failed: str = ""
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


POINTS: dict[str, Any] = {
    "grouped": GemmPoint,
    "dense": GemmPoint,
    "sustained": GemmPoint,
    "attention": AttentionPoint,
    "small": SmallPoint,
    "copies": CopyPoint,
    "reads": ReadPoint,
}
POSITIVE = {"seconds", "alone", "under_compute", "compute_slowdown", "bytes_per_second", "counted_bytes"}


def load_profile(path: str) -> Profile:
    """Read what ``sglang-dwdp profile`` wrote.

    Raises:
        PlannerError: if the file is missing, no JSON, of another version, or holds figures that make no sense.
    """
    file = Path(path)
    if not file.is_file():
        raise PlannerError(f"profile {path} does not exist; make one with `sglang-dwdp profile -o {path}`")
    data = read_json(file, "profile")
    if data.get("version") != FORMAT_VERSION:
        raise PlannerError(f"{path} is no profile of version {FORMAT_VERSION}; measure it again")
    try:
        points: dict[str, Any] = {
            name: tuple(_point(kind, p) for p in data.pop(name, ())) for name, kind in POINTS.items()
        }
        profile = Profile(**data, **points)
        kinds_of_fields(profile)
    except (TypeError, PlannerError) as error:
        raise PlannerError(f"profile {path} is malformed: {error}") from None
    return profile


def _point(kind: Any, settings: Any) -> Any:
    if not isinstance(settings, dict):
        raise PlannerError(f"{settings!r} is no {kind.__name__}")
    for name, value in settings.items():
        if name == "peer":
            whole(name, value, least=ALL_PEERS)
        elif name in POSITIVE:
            number(name, value, positive=True)
        else:
            whole(name, value, least=0 if name == "device" else 1)
    return kind(**settings)
