"""Constants of GB200 from one published breakdown: Table 1 of the DWDP paper (arXiv 2604.01621), and nothing else.

The table is printed in microseconds "per iteration". Only milliseconds for a whole forward make sense of it: 192 remote
experts of 44.04 M NVFP4 parameters in 58 layers are 276 GB, which take 429 ms at 643 GB/s and would take 429 us at 643
TB/s.
"""

from __future__ import annotations

from dataclasses import replace

from sglang_dwdp.planner import kernels
from sglang_dwdp.planner.cost import Group, Parts, forward_parts, layer_fetch_bytes
from sglang_dwdp.planner.dep import exchange_bytes, expert_wait, length_wait
from sglang_dwdp.planner.formats import FORMATS, Precision
from sglang_dwdp.planner.gpus import Efficiency, Gpu, get_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.workload import Batch, Lengths, mean_batch, typical_rounds

# Seconds of one forward: DeepSeek-R1 NVFP4, 4 x GB200, ISL 8K, ratio 0.8, 32,768 tokens.
TABLE_1_DEP = Parts(0.26967, 0.34240, 0.17750, 0.24169, communication=0.12674, synchronisation=0.16185)
TABLE_1_DWDP = Parts(0.32056, 0.33742, 0.18928, 0.28432)
TABLE_1_COPY, TABLE_1_MERGE, TABLE_1_DWDP_TOTAL = 0.429, 0.034, 1.16558
TABLE_1_LENGTHS = Lengths("uniform", 8192, ratio=0.8)
# The paper's introduction, on this very set-up: about 12 % of the iteration goes to waiting when the ranks' sequence
# lengths vary by 20 %. Table 1 shows 12.3 %, so it is read as such an iteration: a rank still packs four such prompts
# into its tokens, which leaves its totals 8 % of variation. The rest of the wait is put down to hot experts.
TABLE_1_VARIED = Lengths("normal", 7373, std=0.20 * 7373)
# TensorRT-LLM's examples/dwdp/dwdp_reproduce.yaml sets ctx_max_num_tokens: 33000 for "32768", and leaves chunked
# prefill off.
TOKEN_BUDGETS = {16384: 16500, 32768: 33000}
PARTS = ("attention", "grouped_gemm", "dense_gemm", "other")
# The NVFP4-v2 checkpoint quantises experts and the attention output projection; context attention reads an FP8 cache;
# the all-to-all dispatches NVFP4.
PRECISION = Precision(FORMATS["nvfp4"], FORMATS["nvfp4"], attention="fp8", dispatch_bytes=0.5625)
MODEL = load_model("deepseek-r1")
GB200 = get_gpu("GB200")
ROUNDS = typical_rounds(TABLE_1_LENGTHS, TOKEN_BUDGETS[32768], False, 4)  # of Table 1


def roofline_gpu(gpu: Gpu) -> Gpu:
    """`gpu` with every efficiency at 1 and no overheads: the paper's section 3 roofline."""
    return replace(
        gpu,
        copy_bandwidth=gpu.link_bandwidth,
        pair_bandwidth=gpu.link_bandwidth,
        efficiency=Efficiency(1.0, 1.0, 1.0, 1.0, weight_read=1.0, collective=1.0, tile_rows=0),
        copy_interference=0.0,
        expert_skew=0.0,
        kernel_gap=0.0,
    )


def merge_seconds(gpu: Gpu) -> float:
    """What the paper's naive version spends on copying local experts beside fetched ones: read and written once."""
    local = MODEL.experts // 4 * MODEL.expert_params * PRECISION.experts.bytes_per_param
    return MODEL.moe_layers * 2 * local / (gpu.hbm_bandwidth * gpu.efficiency.elementwise)


def table_1_length_wait(base: Parts) -> float:
    """Seconds that Table 1's ranks wait for the longest prompts: forwards packed from TABLE_1_VARIED."""
    rounds = typical_rounds(TABLE_1_VARIED, TOKEN_BUDGETS[32768], False, 4)
    return length_wait(base, mean_batch(rounds), rounds)


def calibrate() -> Gpu:
    """GB200 with each constant solved from the one figure of Table 1 that it stands for."""

    def parts(gpu: Gpu, batch: Batch, share: int = 1) -> Parts:
        return forward_parts(MODEL, gpu, PRECISION, batch, experts=MODEL.experts // share)

    gpu, batch, measured = GB200, mean_batch(ROUNDS), TABLE_1_DEP
    perfect = roofline_gpu(gpu)
    ideal = parts(replace(perfect, efficiency=replace(perfect.efficiency, tile_rows=128)), batch, 4)
    gaps = kernels.KERNELS_PER_LAYER * gpu.kernel_gap * MODEL.layers
    sent = exchange_bytes(MODEL, PRECISION, batch.tokens, 4, "all-to-all") * MODEL.moe_layers
    link_time = measured.communication - MODEL.moe_layers * 2 * gpu.kernel_gap
    efficiency = replace(
        gpu.efficiency,
        attention=ideal.attention / measured.attention,
        grouped_gemm=ideal.grouped_gemm / measured.grouped_gemm,
        dense_gemm=ideal.dense_gemm / measured.dense_gemm,
        elementwise=ideal.other / (measured.other - gaps),
        collective=sent / link_time / gpu.link_bandwidth,
    )
    fitted = replace(gpu, efficiency=efficiency)
    base = parts(fitted, batch, 4)
    by_experts = measured.synchronisation - table_1_length_wait(base)
    fully_skewed = expert_wait(MODEL, replace(fitted, expert_skew=1.0), 4, base.grouped_gemm)
    # copies: undo the contention that the naive version's random serial pulls met
    alone = TABLE_1_COPY / (1 + (2 / 3) * TABLE_1_COPY / TABLE_1_DWDP_TOTAL)
    own = parts(fitted, batch)
    slower = sum(getattr(TABLE_1_DWDP, part) - getattr(own, part) for part in PARTS)
    return replace(
        fitted,
        copy_bandwidth=layer_fetch_bytes(MODEL, PRECISION, Group(4)) * MODEL.moe_layers / alone,
        copy_interference=slower / alone,
        expert_skew=by_experts / fully_skewed,
    )
