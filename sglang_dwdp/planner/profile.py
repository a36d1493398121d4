"""A measured profile: rates of one machine's GPUs, and how they replace the defaults.

``measure`` runs on one GPU for the compute part; with more than one it also measures copies from
every peer, alone and under compute. ``fit`` turns the points into the constants of ``Efficiency``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import kernels
from .errors import PlannerError
from .formats import FORMATS, default_precision
from .gpus import Efficiency, Gpu
from .models import ModelShape

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
    """All small kernels of one layer: bytes counted by the cost model, and seconds."""

    tokens: int
    counted_bytes: float
    seconds: float


@dataclass(frozen=True)
class CopyPoint:
    """A copy from ``peer``: bytes/s alone and under compute, and the compute's slowdown meanwhile."""

    peer: int
    alone: float
    under_compute: float
    compute_slowdown: float


@dataclass(frozen=True)
class Profile:
    """What was measured, and where."""

    gpu: str
    device: str
    torch: str
    model: str
    grouped: tuple[GemmPoint, ...] = ()
    dense: tuple[GemmPoint, ...] = ()
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
        "attention": AttentionPoint,
        "small": SmallPoint,
        "copies": CopyPoint,
    }
    try:
        points: dict[str, Any] = {
            name: tuple(kind(**p) for p in data.pop(name, ())) for name, kind in kinds.items()
        }
        return Profile(**data, **points)
    except TypeError as error:
        raise PlannerError(f"profile {path} is malformed: {error}") from None


# -- fitting -------------------------------------------------------------------------------------


def gemm_seconds(gpu: Gpu, rate: float, point: GemmPoint) -> float:
    """The cost model's time of one measured product (``rate`` FLOP/s for large ones)."""
    active = kernels.distinct_experts(point.experts, point.rows) if point.experts > 1 else 1.0
    tile = gpu.efficiency.tile_rows / 2 if point.experts > 1 else 0.0
    flops = 2.0 * (point.rows + tile * active) * point.depth * point.width
    speed = rate * point.depth / (point.depth + gpu.efficiency.half_depth)
    weights = active * point.depth * point.width * 2.0
    return max(flops / speed, weights / (gpu.hbm_bandwidth * gpu.efficiency.weight_read))


def _error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    return float(np.mean(np.log(np.array(predicted) / np.array(measured)) ** 2))


def _fit_gemm(gpu: Gpu, points: Sequence[GemmPoint]) -> tuple[float, float, int, float]:
    """(fraction of peak, half_depth, tile_rows, error): least squares of log(time) over a grid."""
    peak = gpu.peak(FORMATS["bf16"])
    grouped = any(p.experts > 1 for p in points)
    best = (0.5, 0.0, 128, float("inf"))
    measured = [p.seconds for p in points]
    for half in np.linspace(0, 1500, 31):
        for tile in range(0, 257, 32) if grouped else (0,):
            trial = replace(gpu, efficiency=replace(gpu.efficiency, half_depth=float(half), tile_rows=tile))
            for fraction in np.linspace(0.2, 1.0, 81):
                error = _error([gemm_seconds(trial, fraction * peak, p) for p in points], measured)
                if error < best[3]:
                    best = (float(fraction), float(half), tile, error)
    return best


def _fit_attention(gpu: Gpu, points: Sequence[AttentionPoint]) -> tuple[float, float, float]:
    """(fraction of peak, attention_half, softmax_pair) by least squares over a grid."""
    peak = gpu.peak(FORMATS["bf16"])
    length = np.array([p.length for p in points], float)
    heads = np.array([p.heads for p in points], float)
    dim = np.array([p.head_dim for p in points], float)
    measured = np.array([p.seconds for p in points])
    pairs = length * (length + 1) / 2
    several = len(set(dim.tolist())) > 1
    best = (0.5, 0.0, 0.0, float("inf"))
    for half in np.linspace(0, 2000, 41):
        for softmax in np.linspace(0, 1.0e-12, 41) if several else (0.0,):
            for fraction in np.linspace(0.2, 1.0, 81):
                time = pairs * heads * (4 * dim / (fraction * peak) + softmax) * (1 + half / length)
                error = float(np.mean(np.log(time / measured) ** 2))
                if error < best[3]:
                    best = (float(fraction), float(half), float(softmax), error)
    return best[:3]


def _fit_small(gpu: Gpu, points: Sequence[SmallPoint]) -> tuple[float, float]:
    """(fraction of HBM bandwidth, gap per kernel): t = bytes / (HBM f) + kernels gap."""
    moved = np.array([p.counted_bytes for p in points])
    measured = np.array([p.seconds for p in points])
    best = (0.5, gpu.kernel_gap, float("inf"))
    for gap in np.linspace(0, 10e-6, 101):
        for fraction in np.linspace(0.05, 1.0, 191):
            time = moved / (gpu.hbm_bandwidth * fraction) + kernels.KERNELS_PER_LAYER * gap
            error = float(np.mean(np.log(time / measured) ** 2))
            if error < best[2]:
                best = (float(fraction), float(gap), error)
    return best[:2]


def fit(profile: Profile, gpu: Gpu) -> Gpu:
    """``gpu`` with the profile's constants."""
    efficiency: Efficiency = gpu.efficiency
    if profile.grouped:
        fraction, half, tile, _ = _fit_gemm(gpu, profile.grouped)
        efficiency = replace(efficiency, grouped_gemm=fraction, half_depth=half, tile_rows=tile)
    if profile.dense:
        fixed = replace(gpu, efficiency=efficiency)
        peak = gpu.peak(FORMATS["bf16"])
        measured = [p.seconds for p in profile.dense]
        fractions = np.linspace(0.2, 1.2, 201)
        errors = [
            _error([gemm_seconds(fixed, f * peak, p) for p in profile.dense], measured) for f in fractions
        ]
        efficiency = replace(efficiency, dense_gemm=float(fractions[int(np.argmin(errors))]))
    if profile.attention:
        fraction, half_length, softmax = _fit_attention(gpu, profile.attention)
        efficiency = replace(efficiency, attention=fraction, attention_half=half_length, softmax_pair=softmax)
    gap = gpu.kernel_gap
    if profile.small:
        elementwise, gap = _fit_small(gpu, profile.small)
        efficiency = replace(efficiency, elementwise=elementwise)
    fitted = replace(gpu, efficiency=efficiency, kernel_gap=gap)
    if profile.copies:
        pair = float(np.mean([c.under_compute for c in profile.copies]))
        slow = float(np.mean([max(0.0, c.compute_slowdown - 1) for c in profile.copies]))
        fitted = replace(
            fitted,
            pair_bandwidth=pair,
            copy_bandwidth=max(pair, gpu.copy_bandwidth if not gpu.switched else 0),
        )
        fitted = replace(fitted, copy_interference=slow)
    sources = {**gpu.sources, "efficiency": f"measured on {profile.device}, torch {profile.torch}"}
    return replace(fitted, sources=sources)


# -- measuring -----------------------------------------------------------------------------------


def _known_gpu(device_name: str) -> str:
    for name in ("GB200", "B200", "H200", "H100", "MI355X"):
        if name in device_name.upper():
            return name
    return "unknown"


def measure(model: ModelShape, quick: bool = False, device: str | None = None) -> Profile:
    """Measure on this machine; takes about a minute on one GPU.

    Raises:
        PlannerError: without torch or a GPU (``device="cpu"`` measures the CPU, for tests).
    """
    try:
        import torch
    except ImportError:
        raise PlannerError("measuring needs PyTorch with a GPU; it is not installed") from None
    if device is None and not torch.cuda.is_available():
        raise PlannerError("no GPU is visible to PyTorch; run the profile on the machine that will serve")
    device = device or "cuda"
    from .torch_layer import TorchLayer, median_seconds

    def timed(call: Any) -> float:
        return median_seconds(torch, device, call)

    layer = TorchLayer(model, device)
    sizes = (64, 1024, 8192) if quick else (64, 256, 1024, 2048, 4096, 8192, 16384)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    grouped: list[GemmPoint] = []
    dense: list[GemmPoint] = []
    small: list[SmallPoint] = []
    bf16 = default_precision(FORMATS["bf16"])
    for count in sizes:
        x = layer.tokens(count)
        cos, sin = layer.angles(count)
        scores = x @ layer.router
        _, order, ends = layer.route(scores)
        rows = x[order // model.top_k]
        both = layer.grouped(rows, layer.up, ends)
        middle = layer.activate(both)
        for a, b in ((rows, layer.up), (middle, layer.down)):
            seconds = timed(lambda a=a, b=b, ends=ends: layer.grouped(a, b, ends))
            grouped.append(GemmPoint(a.shape[0], model.experts, b.shape[1], b.shape[2], seconds))
        qkv = x @ layer.qkv
        wide = layer.torch.randn(count, layer.out.shape[0], device=device).bfloat16()
        for a, b in ((x, layer.qkv), (wide, layer.out)):
            seconds = timed(lambda a=a, b=b: a @ b)
            dense.append(GemmPoint(count, 1, b.shape[0], b.shape[1], seconds))
        out = layer.grouped(middle, layer.down, ends)
        inputs = (x, qkv, scores, both, out, cos, sin)
        seconds = timed(lambda inputs=inputs: layer.small(*inputs))
        counted = count * kernels.elementwise_elements(model, True) * bf16.activation_bytes
        small.append(SmallPoint(count, counted, seconds))
    attention: list[AttentionPoint] = []
    for dim in sorted({64, 128, model.qk_dim}):
        for length in (n for n in sizes if n >= 1024 or quick):
            shape = (1, model.heads, length, dim)
            narrow = (1, model.kv_heads, length, dim)
            q = torch.randn(shape, device=device).bfloat16()
            k = torch.randn(narrow, device=device).bfloat16()
            seconds = timed(lambda q=q, k=k: layer.attend(q, k, k))
            attention.append(AttentionPoint(length, model.heads, model.kv_heads, dim, seconds))
    copies = _measure_copies(torch) if device == "cuda" and torch.cuda.device_count() > 1 else ()
    return Profile(
        gpu=_known_gpu(name),
        device=name,
        torch=str(torch.__version__),
        model=model.name,
        grouped=tuple(grouped),
        dense=tuple(dense),
        attention=tuple(attention),
        small=tuple(small),
        copies=tuple(copies),
    )


def _measure_copies(torch: Any) -> list[CopyPoint]:
    """Pull 1 GiB from every peer to GPU 0, alone and while GPU 0 multiplies matrices."""
    size = 1 << 30
    target = torch.empty(size, dtype=torch.uint8, device="cuda:0")
    a = torch.randn(8192, 8192, device="cuda:0").bfloat16()
    stream = torch.cuda.Stream("cuda:0")

    def run(source: Any, copies: int, products: int) -> tuple[float, float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            marks[0].record()
            for _ in range(copies):
                target.copy_(source, non_blocking=True)
            marks[1].record()
        marks[2].record()
        for _ in range(products):
            a @ a
        marks[3].record()
        torch.cuda.synchronize()
        copying = marks[0].elapsed_time(marks[1]) / 1e3 if copies else 0.0
        computing = marks[2].elapsed_time(marks[3]) / 1e3 if products else 0.0
        return copying, computing

    points = []
    for peer in range(1, torch.cuda.device_count()):
        source = torch.empty(size, dtype=torch.uint8, device=f"cuda:{peer}")
        run(source, 2, 5)
        alone = run(source, 10, 0)[0] / 10
        product = run(source, 0, 40)[1] / 40
        products = max(1, int(0.8 * 10 * alone / product))  # the copies outlast the products
        slowed = run(source, 10, products)[1] / products
        copies_needed = max(1, int(0.8 * 40 * product / alone))
        under = run(source, copies_needed, 40)[0] / copies_needed
        points.append(CopyPoint(peer, size / alone, size / under, slowed / product))
    return points
