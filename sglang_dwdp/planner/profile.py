"""A measured profile: rates of one machine's GPUs, and how they replace the defaults.

``measure`` runs on one GPU for the compute part; with more than one it also measures copies from
every peer, alone and under compute. ``fit`` turns the points into the constants of ``Efficiency``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .errors import PlannerError
from .formats import FORMATS
from .gpus import Gpu
from .models import ModelShape

FORMAT_VERSION = 1
Array = NDArray[np.float64]


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


# -- fitting -------------------------------------------------------------------------------------


def _gemm_parts(gpu: Gpu, points: Sequence[GemmPoint], tile: float) -> tuple[Array, Array, Array]:
    """(seconds at the matrix peak, seconds at HBM peak, inner dimension) of each point."""
    rows = np.array([p.rows for p in points], float)
    several = np.array([p.experts > 1 for p in points])
    active = np.array([kernels.distinct_experts(p.experts, p.rows) if p.experts > 1 else 1.0 for p in points])
    depth = np.array([p.depth for p in points], float)
    weights = depth * np.array([p.width for p in points], float)
    padded = rows + np.where(several, tile / 2 * active, 0.0)
    compute = 2.0 * padded * weights / gpu.peak(FORMATS["bf16"])
    return compute, 2.0 * active * weights / gpu.hbm_bandwidth, depth


def _log_error(predicted: Array, measured: Array) -> Array:
    """Mean squared log ratio over the last axis."""
    return np.asarray(np.mean(np.log(predicted / measured) ** 2, axis=-1))


def _fit_grouped(gpu: Gpu, points: Sequence[GemmPoint]) -> dict[str, Any]:
    """Constants of the grouped products, by least squares of log(time) over a grid."""
    measured = np.array([p.seconds for p in points])
    fraction = np.linspace(0.2, 1.0, 81)[:, None, None]
    read = np.linspace(0.5, 1.0, 26)[None, :, None]
    best, found = np.inf, {}
    for tile, half, power in product((0, 64, 128, 192, 256), np.linspace(0, 800, 17), (2, 3, 4, 8)):
        compute, memory, depth = _gemm_parts(gpu, points, tile)
        c = compute * (depth + half) / depth / fraction
        m = memory / read
        errors = _log_error((c**power + m**power) ** (1 / power), measured)
        if errors.min() < best:
            best = float(errors.min())
            i, k = np.unravel_index(int(errors.argmin()), errors.shape)
            found = {
                "grouped_gemm": float(fraction[i, 0, 0]),
                "weight_read": float(read[0, k, 0]),
                "tile_rows": int(tile),
                "half_depth": float(half),
                "overlap_power": float(power),
            }
    return found


def _fit_dense(gpu: Gpu, points: Sequence[GemmPoint]) -> dict[str, Any]:
    """Fraction of peak and fixed latency of single products."""
    measured = np.array([p.seconds for p in points])
    compute, memory, _ = _gemm_parts(gpu, points, 0)
    power = min(gpu.efficiency.overlap_power, 64.0)
    fraction = np.linspace(0.2, 1.0, 161)[:, None, None]
    latency = np.linspace(0, 20e-6, 81)[None, :, None]
    m = memory / gpu.efficiency.weight_read
    errors = _log_error(((compute / fraction) ** power + m**power) ** (1 / power) + latency, measured)
    i, k = np.unravel_index(int(errors.argmin()), errors.shape)
    return {"dense_gemm": float(fraction[i, 0, 0]), "gemm_latency": float(latency[0, k, 0])}


def _fit_attention(gpu: Gpu, points: Sequence[AttentionPoint]) -> dict[str, Any]:
    """Constants of attention; the head-dependent ones only from points that differ in heads."""
    length = np.array([p.length for p in points], float)
    heads = np.array([p.heads for p in points], float)
    dim = np.array([p.head_dim for p in points], float)
    measured = np.array([p.seconds for p in points])
    pairs = heads * length * (length + 1) / 2
    halves = np.linspace(0, 3000, 61)[:, None, None]
    fractions = np.linspace(0.2, 1.0, 81)[None, :, None]
    softmaxes = np.linspace(0, 1e-12, 41) if len(set(dim.tolist())) > 1 else np.zeros(1)
    fills = np.linspace(0, 120_000, 41) if len(set(heads.tolist())) > 1 else np.zeros(1)
    best, found = np.inf, {}
    for softmax, fill in product(softmaxes, fills):
        work = pairs * (4 * dim / (fractions * gpu.peak(FORMATS["bf16"])) + softmax)
        errors = _log_error(work * (1 + halves / length + fill / (heads * length)), measured)
        if errors.min() < best:
            best = float(errors.min())
            i, k = np.unravel_index(int(errors.argmin()), errors.shape)
            found = {
                "attention": float(fractions[0, k, 0]),
                "attention_half": float(halves[i, 0, 0]),
                "attention_fill": float(fill),
                "softmax_pair": float(softmax),
            }
    return found


def _fit_small(gpu: Gpu, points: Sequence[SmallPoint]) -> tuple[float, float]:
    """(fraction of HBM bandwidth, gap per kernel): t = bytes / (HBM f) + kernels gap."""
    moved = np.array([p.counted_bytes for p in points])
    launches = np.array([p.kernels for p in points], float)
    measured = np.array([p.seconds for p in points])
    fraction = np.linspace(0.05, 1.0, 191)[:, None, None]
    gap = np.linspace(0, 10e-6, 201)[None, :, None]
    errors = _log_error(moved / (gpu.hbm_bandwidth * fraction) + launches * gap, measured)
    i, k = np.unravel_index(int(errors.argmin()), errors.shape)
    return float(fraction[i, 0, 0]), float(gap[0, k, 0])


def fit(profile: Profile, gpu: Gpu) -> Gpu:
    """``gpu`` with the profile's constants."""
    fitted = gpu

    def improve(**constants: Any) -> None:
        nonlocal fitted
        fitted = replace(fitted, efficiency=replace(fitted.efficiency, **constants))

    if profile.grouped:
        improve(**_fit_grouped(gpu, profile.grouped))
    if profile.dense:
        improve(**_fit_dense(fitted, profile.dense))
    if profile.sustained:
        ideal, _, _ = _gemm_parts(gpu, profile.sustained, 0)
        improve(gemm_cap=float(np.mean(ideal / [p.seconds for p in profile.sustained])))
    if profile.attention:
        improve(**_fit_attention(gpu, profile.attention))
    if profile.small:
        elementwise, gap = _fit_small(gpu, profile.small)
        improve(elementwise=elementwise)
        fitted = replace(fitted, kernel_gap=gap)
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
    from .torch_layer import SMALL_KERNELS, TorchLayer, median_seconds, small_elements

    def timed(call: Any) -> float:
        return median_seconds(torch, device, call)

    layer = TorchLayer(model, device)
    sizes = (64, 1024, 4096) if quick else (64, 256, 1024, 2048, 4096, 8192, 16384)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    # First, because half a second of it also brings an idle GPU to its working clocks.
    edge = 8192 if device == "cuda" else 256
    a, b = (torch.randn((n, edge), device=device).bfloat16() for n in (2 * edge, edge))
    seconds = median_seconds(torch, device, lambda: a @ b, repeats=200)
    sustained = (GemmPoint(2 * edge, 1, edge, edge, seconds),)
    grouped: list[GemmPoint] = []
    dense: list[GemmPoint] = []
    small: list[SmallPoint] = []
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
        small.append(SmallPoint(count, count * small_elements(model) * 2.0, SMALL_KERNELS, seconds))
    attention: list[AttentionPoint] = []
    shapes = [(h, d) for h in (max(1, model.heads // 2), model.heads, 2 * model.heads) for d in (64, 128)]
    for heads, dim in shapes:
        for length in (n for n in sizes if n >= 1024):
            kv_heads = max(1, heads * model.kv_heads // model.heads)
            q = torch.randn((1, heads, length, dim), device=device).bfloat16()
            k = torch.randn((1, kv_heads, length, dim), device=device).bfloat16()
            seconds = timed(lambda q=q, k=k: layer.attend(q, k, k))
            attention.append(AttentionPoint(length, heads, kv_heads, dim, seconds))
    copies = _measure_copies(torch) if device == "cuda" and torch.cuda.device_count() > 1 else ()
    return Profile(
        gpu=_known_gpu(name),
        device=name,
        torch=str(torch.__version__),
        model=model.name,
        grouped=tuple(grouped),
        dense=tuple(dense),
        sustained=sustained,
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
