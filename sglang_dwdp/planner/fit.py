"""From measured points to the constants of the cost model: least squares of log(time) over grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .formats import FORMATS
from .gpu import Gpu
from .profile import ALL_PEERS, AttentionPoint, CopyPoint, GemmPoint, Profile, SmallPoint

Array = NDArray[np.float64]


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


def _fit_copies(gpu: Gpu, link: Sequence[CopyPoint]) -> Gpu:
    """Copy rates under compute, and the compute lost per second of copying, 1 - 1/slowdown."""
    pairs = [point for point in link if point.peer != ALL_PEERS]
    together = [point for point in link if point.peer == ALL_PEERS]
    pair = float(np.mean([point.under_compute for point in pairs or together]))
    if together:
        several = float(np.mean([point.under_compute for point in together]))
    else:  # two GPUs: one peer is all, and what several wires would do is not known
        several = pair if gpu.switched else max(pair, gpu.copy_bandwidth)
    lost = float(np.mean([max(0.0, 1 - 1 / point.compute_slowdown) for point in link]))
    return replace(gpu, pair_bandwidth=pair, copy_bandwidth=several, copy_interference=lost)


def fit(profile: Profile, gpu: Gpu) -> Gpu:
    """``gpu`` with the profile's constants; what was not measured stays."""
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
    link = [point for point in profile.copies if point.crosses_link]
    if link:
        fitted = _fit_copies(fitted, link)
    reads = [point.bytes_per_second for point in profile.reads if point.peer != point.device]
    if reads:
        fitted = replace(fitted, direct_read=float(np.mean(reads)))
    sources = {**gpu.sources, "efficiency": f"measured on {profile.device}, torch {profile.torch}"}
    where = f"measured on {profile.device}"
    if profile.small:
        sources["kernel_gap"] = where
    if link:
        sources |= dict.fromkeys(("copy_bandwidth", "pair_bandwidth", "copy_interference"), where)
    if reads:
        sources["direct_read"] = where
    return replace(fitted, sources=sources)
