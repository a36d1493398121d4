"""Time of one decode step: of a rank alone, which reads experts in place, and of ranks that decode together.

All times are seconds of a step in which every rank has as many sequences. Sampling and the host are left out, so steps
of a few sequences come out too fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_dwdp.experts.direct_limit import in_place_over_copies
from sglang_dwdp.planner import kernels
from sglang_dwdp.planner.cost import Group, equal_share, pull_bandwidth
from sglang_dwdp.planner.formats import FORMATS, Precision
from sglang_dwdp.planner.gpus import Gpu
from sglang_dwdp.planner.shape import ModelShape

SEQUENCES = (1, 8, 32, 64, 128, 256)  # of a rank
# Dispatch and combine of one row a rank by FlashInfer's one-sided all-to-all in CUDA graphs, between two H100.
EXCHANGE_SECONDS = 11.7e-6


@dataclass(frozen=True)
class Step:
    """One decode step.

    Attributes:
        sequences: of a rank.
        alone: seconds where each rank reads its experts in place.
        together: seconds with `--dwdp-exchange auto`, when all ranks are there.
        replica: seconds on a GPU with all experts.
    """

    sequences: int
    alone: float
    together: float
    replica: float


def decode_step(
    model: ModelShape, gpu: Gpu, precision: Precision, group: Group, sequences: int, context: float
) -> Step:
    """One step of `sequences` sequences a rank, each with `context` tokens in the cache.

    n tokens that choose k of E experts touch E (1 - (1 - k/E)^n). Alone, a rank reads what it does not store of these
    at the bandwidth of kernels over the link, and what it stores beside that. Together, it runs E/N experts for all
    ranks' tokens, and sends each row to at most N - 1 peers and back.
    """
    ranks, experts = group.size, precision.experts
    one = model.expert_params * experts.bytes_per_param
    hbm = gpu.hbm_bandwidth * gpu.efficiency.weight_read
    cached = (model.kv_rank + model.rope_dim) or model.kv_heads * (model.qk_dim + model.v_dim)
    shared = kernels.dense_gemms(model, gpu, precision, sequences)
    shared += model.moe_layers * kernels.elementwise(model, gpu, precision, sequences, moe=True)
    shared += model.dense_layers * kernels.elementwise(model, gpu, precision, sequences, moe=False)
    shared += model.layers * sequences * context * cached * precision.activation_bytes / hbm
    shared += kernels.dense_gemm(gpu, FORMATS["bf16"], sequences, model.hidden * model.vocab)

    def run(rows: float, count: int) -> float:
        return kernels.grouped_gemm(model, gpu, experts, rows * model.top_k * count / model.experts, count)

    remote = 1 - group.stored(model) / model.experts
    all_copied = model.experts * remote * one / pull_bandwidth(gpu, group)
    over_link = in_place_over_copies(sequences, model.experts, model.top_k) * all_copied
    rows = sequences * (ranks - 1) * model.hidden * 2 * precision.activation_bytes
    exchange = EXCHANGE_SECONDS + rows / (gpu.link_bandwidth * gpu.efficiency.collective)
    everything = run(sequences, model.experts)
    return Step(
        sequences,
        alone=shared + model.moe_layers * max(everything, over_link),
        together=shared + model.moe_layers * (run(sequences * ranks, equal_share(model, ranks)) + exchange),
        replica=shared + model.moe_layers * everything,
    )


def pays_from(steps: Sequence[Step]) -> int | None:
    """The fewest sequences of these from which decoding together is sooner than alone; None if it never is."""
    return next((step.sequences for step in steps if step.together < step.alone), None)
