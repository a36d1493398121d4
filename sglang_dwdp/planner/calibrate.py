"""Efficiencies from one published breakdown: Table 1 of the DWDP paper, and nothing else.

The table is printed in microseconds "per iteration". Only milliseconds for a whole forward make
sense of it: 192 remote experts of 44.04 M NVFP4 parameters in 58 layers are 276 GB, which take
429 ms at 643 GB/s and would take 429 us at 643 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import kernels
from .cost import Group, Parts, forward_parts, layer_fetch_bytes
from .dep import exchange_bytes, expert_wait, length_wait
from .formats import FORMATS, Precision
from .gpu import Efficiency, roofline_gpu
from .gpus import get_gpu
from .models import load_model
from .workload import Batch, Lengths, mean_batch, typical_rounds


@dataclass(frozen=True)
class Breakdown:
    """One forward of one rank, seconds by part."""

    attention: float
    grouped_gemm: float
    dense_gemm: float
    other: float
    communication: float = 0.0
    synchronisation: float = 0.0
    copy: float = 0.0
    total: float = 0.0


# arXiv 2604.01621 Table 1: DeepSeek-R1 NVFP4, 4 x GB200, ISL 8K, ratio 0.8, 32,768 tokens.
TABLE_1_DEP = Breakdown(0.26967, 0.34240, 0.17750, 0.24169, 0.12674, 0.16185, total=1.31985)
TABLE_1_DWDP = Breakdown(0.32056, 0.33742, 0.18928, 0.28432, copy=0.429, total=1.16558)
TABLE_1_LENGTHS = Lengths("uniform", 8192, ratio=0.8)
# The paper's introduction, on this very set-up: about 12 % of the iteration goes to waiting when the
# ranks' sequence lengths vary by 20 %. Table 1 shows 12.3 %, so it is read as such an iteration: a
# rank still packs four such prompts into its tokens, which leaves its totals 8 % of variation. The
# rest of the wait is put down to hot experts. docs/planner.md has the other readings.
TABLE_1_VARIED = Lengths("normal", 7373, std=0.20 * 7373)
# TensorRT-LLM's examples/dwdp/dwdp_reproduce.yaml sets ctx_max_num_tokens: 33000 for "32768", and
# leaves chunked prefill off.
TOKEN_BUDGETS = {16384: 16500, 32768: 33000}
PARTS = ("attention", "grouped_gemm", "dense_gemm", "other")
# The NVFP4-v2 checkpoint quantises experts and the attention output projection; context attention
# reads an FP8 cache; the all-to-all dispatches NVFP4.
PAPER_PRECISION = Precision(FORMATS["nvfp4"], FORMATS["nvfp4"], attention="fp8", kv_bytes=1.0, dispatch_bytes=0.5625)


@dataclass(frozen=True)
class Calibration:
    """What Table 1 says about GB200, in the units of ``Gpu`` and ``Efficiency``."""

    efficiency: Efficiency
    copy_bandwidth: float
    copy_interference: float
    expert_skew: float


def table_1_rounds() -> tuple[tuple[Batch, ...], ...]:
    """The forwards of Table 1: four ranks that pack prompts of 6.5K to 8K into 33,000 tokens."""
    return typical_rounds(TABLE_1_LENGTHS, TOKEN_BUDGETS[32768], False, 4)


def table_1_length_wait(base: Parts) -> float:
    """Seconds that Table 1's ranks wait for the longest prompts: forwards packed from TABLE_1_VARIED."""
    rounds = typical_rounds(TABLE_1_VARIED, TOKEN_BUDGETS[32768], False, 4)
    return length_wait(base, mean_batch(rounds), rounds)


def calibrate(by_lengths: float | None = None) -> Calibration:
    """Solve each constant from the one figure of Table 1 that it stands for.

    Args:
        by_lengths: seconds of Table 1's wait that are due to lengths; ``table_1_length_wait`` by default.
    """
    model = load_model("deepseek-r1")
    gpu = get_gpu("GB200")
    rounds = table_1_rounds()
    batch = mean_batch(rounds)
    ideal_gpu = replace(roofline_gpu(gpu), efficiency=replace(roofline_gpu(gpu).efficiency, tile_rows=128))
    ideal = forward_parts(model, ideal_gpu, PAPER_PRECISION, batch, experts=model.experts // 4)
    measured = TABLE_1_DEP
    gaps = kernels.KERNELS_PER_LAYER * gpu.kernel_gap * model.layers
    sent = exchange_bytes(model, PAPER_PRECISION, batch.tokens, 4, "all-to-all") * model.moe_layers
    link_time = measured.communication - model.moe_layers * 2 * gpu.kernel_gap
    efficiency = replace(
        gpu.efficiency,
        attention=ideal.attention / measured.attention,
        grouped_gemm=ideal.grouped_gemm / measured.grouped_gemm,
        dense_gemm=ideal.dense_gemm / measured.dense_gemm,
        elementwise=ideal.other / (measured.other - gaps),
        collective=sent / link_time / gpu.link_bandwidth,
    )
    fitted = replace(gpu, efficiency=efficiency)
    base = forward_parts(model, fitted, PAPER_PRECISION, batch, experts=model.experts // 4)
    by_experts = measured.synchronisation - (table_1_length_wait(base) if by_lengths is None else by_lengths)
    fully_skewed = expert_wait(model, replace(fitted, expert_skew=1.0), 4, base.grouped_gemm)
    # copies: undo the contention that the naive version's random serial pulls met
    period, copy = TABLE_1_DWDP.total, TABLE_1_DWDP.copy
    alone = copy / (1 + (2 / 3) * copy / period)
    total_bytes = layer_fetch_bytes(model, PAPER_PRECISION, Group(4)) * model.moe_layers
    own = forward_parts(model, fitted, PAPER_PRECISION, batch)
    slower = sum(getattr(TABLE_1_DWDP, part) - getattr(own, part) for part in PARTS)
    return Calibration(
        efficiency=efficiency,
        copy_bandwidth=total_bytes / alone,
        copy_interference=slower / alone,
        expert_skew=by_experts / fully_skewed,
    )
