"""Time of one forward under DEP: dp-attention with expert parallelism.

Attention runs on each rank's own tokens, tokens travel to the ranks that own their experts and back, and all ranks meet
in every layer. All times are seconds per forward of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np

from sglang_dwdp.planner import kernels
from sglang_dwdp.planner.cost import Estimate, Parts, equal_share, forward_parts
from sglang_dwdp.planner.formats import Precision
from sglang_dwdp.planner.gpus import Gpu
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.workload import Batch, mean_batch

Exchange = Literal["all-to-all", "all-gather", "all-copies"]


def exchange_bytes(model: ModelShape, precision: Precision, tokens: float, ranks: int, exchange: Exchange) -> float:
    """Bytes that a rank sends per MoE layer under DEP, dispatch and combine together.

    `all-to-all`: one copy per remote rank that owns one of the token's experts, (N-1)(1 - (1-1/N)^k) of them.
    `all-copies`: one per routed copy, k (N-1)/N. `all-gather`: every token to every rank, and partial sums back
    (SGLang's dp-attention without an all-to-all backend). Dispatch carries `dispatch_bytes` per element, combine 2
    (bf16).
    """
    if exchange == "all-gather":
        return tokens * (ranks - 1) * model.hidden * 2 * 2.0
    if exchange == "all-to-all":
        copies = (ranks - 1) * (1 - (1 - 1 / ranks) ** model.top_k)
    else:
        copies = model.top_k * (ranks - 1) / ranks
    return tokens * copies * model.hidden * (precision.dispatch_bytes + 2.0)


def exchange_seconds(
    model: ModelShape, gpu: Gpu, precision: Precision, tokens: float, ranks: int, exchange: Exchange
) -> float:
    """Seconds of all layers' exchanges.

    They run at a fraction of the link; on a mesh of point-to-point wires no faster than copies from several peers were
    measured to cross it, which is less.
    """
    if ranks == 1:
        return 0.0
    bandwidth = gpu.link_bandwidth * gpu.efficiency.collective
    if not gpu.switched:
        bandwidth = min(bandwidth, gpu.copy_bandwidth)
    sent = exchange_bytes(model, precision, tokens, ranks, exchange)
    return model.moe_layers * (sent / bandwidth + 2 * gpu.kernel_gap)


def gathered_seconds(
    model: ModelShape, gpu: Gpu, precision: Precision, tokens: float, ranks: int, exchange: Exchange
) -> float:
    """Seconds of all layers' small kernels on rows of other ranks' experts, which only an all-gather brings along.

    SGLang's Triton experts keep a row for each of the N T k routed copies of all gathered tokens, of which T k are for
    experts of this rank. They write zeros for the rest (2 intermediate and hidden elements each), read hidden ones
    again in the weighted sum, and write hidden for each of the (N-1) T foreign tokens.
    """
    if exchange != "all-gather" or not gpu.gathered_rows:
        return 0.0
    zeros = model.top_k * (2 * model.hidden + 2 * model.moe_intermediate)
    moved = (ranks - 1) * tokens * (zeros + model.hidden) * precision.activation_bytes
    return model.moe_layers * moved / (gpu.hbm_bandwidth * gpu.efficiency.elementwise)


def expert_wait(model: ModelShape, gpu: Gpu, ranks: int, grouped: float) -> float:
    """Wait for the rank with the hottest experts: (max/mean - 1) of the grouped products.

    One expert's load varies by v = skew sqrt(E/k - 1): if the same k experts got every token, it would vary by sqrt(E/k
    - 1), the most that top-k routing permits. A rank's load sums E/N of them, so it varies by v sqrt(N/E), and the
    hottest of N lies as many deviations above the mean as the largest of N normals (Blom's approximation).
    """
    hottest = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0
    variation = gpu.expert_skew * sqrt(model.experts / model.top_k - 1)
    return grouped * variation * sqrt(ranks / model.experts) * hottest


def length_wait(base: Parts, mean: Batch, rounds: Sequence[Sequence[Batch]]) -> float:
    """Wait for the rank with the most attention and dense work, over typical rounds.

    Dense and small kernels scale with tokens, attention with pairs; the experts' products are shared by all ranks and
    do not wait for lengths.
    """

    def own(batch: Batch) -> float:
        pairs = batch.pairs / mean.pairs if mean.pairs else 0.0
        return base.attention * pairs + (base.dense_gemm + base.other) * batch.tokens / mean.tokens

    slowest = float(np.mean([max(own(batch) for batch in ranks) for ranks in rounds]))
    return max(0.0, slowest - own(mean))


def dep(
    model: ModelShape,
    gpu: Gpu,
    precision: Precision,
    rounds: Sequence[Sequence[Batch]],
    exchange: Exchange = "all-to-all",
) -> Estimate:
    """One DEP forward, averaged over `rounds` (`[rounds][ranks]` batches run in step).

    T = compute + communication + wait for the slowest rank, by lengths and by experts.
    """
    ranks = len(rounds[0])
    mean = mean_batch(rounds)
    base = forward_parts(model, gpu, precision, mean, experts=equal_share(model, ranks))
    gathered = gathered_seconds(model, gpu, precision, mean.tokens, ranks, exchange)
    parts = replace(
        base,
        other=base.other + gathered,
        communication=exchange_seconds(model, gpu, precision, mean.tokens, ranks, exchange),
        synchronisation=length_wait(base, mean, rounds) + expert_wait(model, gpu, ranks, base.grouped_gemm),
    )
    return Estimate("dep", mean.tokens, parts, base.total + gathered)


def dep_forward(
    model: ModelShape, gpu: Gpu, precision: Precision, batches: Sequence[Batch], exchange: Exchange
) -> tuple[float, float]:
    """One forward of these very batches: (its seconds, seconds that all ranks together wait in it).

    The experts' products are shared, whoever sent the tokens. A rank without tokens still launches its kernels:
    `elementwise` at zero tokens is the gaps.
    """
    n = len(batches)
    tokens = sum(b.tokens for b in batches) / n
    grouped = forward_parts(model, gpu, precision, Batch(tokens, 0.0), experts=equal_share(model, n)).grouped_gemm
    own = [model.layers * kernels.elementwise(model, gpu, precision, 0.0, moe=True)] * n
    for rank, batch in enumerate(batches):
        if batch.tokens:
            parts = forward_parts(model, gpu, precision, batch)
            own[rank] = parts.total - parts.grouped_gemm
    hottest = expert_wait(model, gpu, n, grouped)
    moved = exchange_seconds(model, gpu, precision, tokens, n, exchange)
    gathered = gathered_seconds(model, gpu, precision, tokens, n, exchange)
    return max(own) + grouped + hottest + moved + gathered, (max(own) + hottest) * n - sum(own)
