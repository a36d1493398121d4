"""Time of the kernels of one layer on one GPU: the roofline with efficiencies.

Every function returns seconds. FLOP counts are 2 per multiply-add; bytes are those that have to cross HBM once.
"""

from __future__ import annotations

from sglang_dwdp.planner.formats import FORMATS, Precision, WeightFormat
from sglang_dwdp.planner.gpus import Gpu
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.workload import Batch

# Dependent kernels of a decoder layer outside the big products: norms, rotary embedding, cache write, router, top-k,
# permutation, activation, finalisation, quantisation.
KERNELS_PER_LAYER = 20


def distinct_experts(experts: int, rows: float) -> float:
    """Expected number of distinct experts among `rows` uniform draws: E (1 - (1 - 1/E)^rows)."""
    if experts <= 0 or rows <= 0:
        return 0.0
    return experts * float(1.0 - (1.0 - 1.0 / experts) ** rows)


def overlapped(gpu: Gpu, compute: float, memory: float) -> float:
    """Seconds of a kernel that computes and reads at once: (c^p + m^p)^(1/p), p the overlap power."""
    power, larger = gpu.efficiency.overlap_power, max(compute, memory)
    return larger * float((1 + (min(compute, memory) / larger) ** power) ** (1 / power)) if larger else 0.0


def dense_gemm(gpu: Gpu, fmt: WeightFormat, rows: float, params: float) -> float:
    """`rows` activations times `params` weights.

    The overlap of 2 rows params / (peak eff) with weight bytes / (HBM eff), plus the latency.
    """
    return _product(gpu, fmt, gpu.efficiency.dense_gemm, rows, params, params) if rows > 0 and params > 0 else 0.0


def _product(gpu: Gpu, fmt: WeightFormat, fraction: float, rows: float, multiplied: float, read: float) -> float:
    """`rows` rows at `fraction` of the peak, each times `multiplied` weights, of which `read` are read once."""
    compute = 2.0 * rows * multiplied / (gpu.peak(fmt) * min(fraction, gpu.efficiency.gemm_cap))
    memory = read * fmt.bytes_per_param / (gpu.hbm_bandwidth * gpu.efficiency.weight_read)
    return overlapped(gpu, compute, memory) + gpu.efficiency.gemm_latency


def grouped_product(gpu: Gpu, fmt: WeightFormat, rows: float, experts: int, depth: int, width: int) -> float:
    """`rows` rows spread evenly over `experts` matrices of [depth, width].

    Rows are padded to the tile, which costs half a tile per expert that has any: F = 2 depth width (rows + tile/2
    active), at peak min(eff depth/(depth + half_depth), cap); bytes are the active experts' weights.
    """
    active = distinct_experts(experts, rows)
    if active == 0:
        return 0.0
    padded = rows + gpu.efficiency.tile_rows / 2 * active
    fraction = gpu.efficiency.grouped_gemm * depth / (depth + gpu.efficiency.half_depth)
    return _product(gpu, fmt, fraction, padded, depth * width, active * depth * width)


def grouped_gemm(model: ModelShape, gpu: Gpu, fmt: WeightFormat, rows: float, experts: int) -> float:
    """One layer's routed experts for `rows` routed copies: gate and up in one product, then down."""
    up = grouped_product(gpu, fmt, rows, experts, model.hidden, 2 * model.moe_intermediate)
    return up + grouped_product(gpu, fmt, rows, experts, model.moe_intermediate, model.hidden)


def attention(model: ModelShape, gpu: Gpu, precision: Precision, batch: Batch) -> float:
    """Causal attention of all layers: 2 (d_qk + d_v) heads FLOP per pair; windowed layers see fewer."""
    pairs = (model.layers - model.window_layers) * batch.pairs + model.window_layers * batch.window_pairs
    flops = 2.0 * pairs * model.heads * (model.qk_dim + model.v_dim)
    return flops / (gpu.peak(FORMATS[precision.attention]) * gpu.efficiency.attention)


def dense_gemms(model: ModelShape, gpu: Gpu, precision: Precision, tokens: float) -> float:
    """All layers' projections, dense MLPs, shared experts and routers."""
    projections = dense_gemm(gpu, precision.projections, tokens, model.projection_params)
    mlp = dense_gemm(gpu, precision.experts, tokens, 3 * model.hidden * model.dense_intermediate)
    shared = dense_gemm(gpu, precision.experts, tokens, 3 * model.hidden * model.shared_intermediate)
    router = dense_gemm(gpu, FORMATS["bf16"], tokens, model.hidden * model.experts)
    return model.layers * projections + model.dense_layers * mlp + model.moe_layers * (shared + router)


def elementwise_elements(model: ModelShape, moe: bool) -> float:
    """Elements per token that the small kernels of one layer read and write.

    Two fused norms (8 hidden), query, key and value in and out of the rotary embedding and cache write (2 each), the
    routed copies' permutation and weighted sum (2 hidden per copy + hidden), the activation (3 intermediate per copy).
    """
    if not model.kv_rank:
        qkv = model.heads * model.qk_dim + model.kv_heads * (model.qk_dim + model.v_dim)
    else:  # the latent key and value are expanded per head for prefill
        qkv = model.heads * (2 * model.qk_dim + model.v_dim)
    elements = 8.0 * model.hidden + 2.0 * qkv
    if not moe:
        return elements + 3.0 * model.dense_intermediate
    routed = model.top_k * (2 * model.hidden + 3 * model.moe_intermediate) + model.hidden
    return elements + routed + 3.0 * model.shared_intermediate


def elementwise(model: ModelShape, gpu: Gpu, precision: Precision, tokens: float, moe: bool) -> float:
    """The small kernels of one layer: bytes / (HBM eff) plus the gaps between kernels."""
    moved = tokens * elementwise_elements(model, moe) * precision.activation_bytes
    return moved / (gpu.hbm_bandwidth * gpu.efficiency.elementwise) + KERNELS_PER_LAYER * gpu.kernel_gap
