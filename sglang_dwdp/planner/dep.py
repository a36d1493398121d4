"""Time of one forward under DEP: dp-attention with expert parallelism.

Attention runs on each rank's own tokens, tokens travel to the ranks that own their experts and
back, and all ranks meet in every layer. All times are seconds per forward of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np

from .cost import Estimate, Parts, forward_parts
from .errors import PlannerError
from .formats import Precision
from .gpu import Gpu
from .shape import ModelShape
from .workload import Batch, mean_batch

EXCHANGES = ("all-to-all", "all-gather", "all-copies")


def exchange_bytes(model: ModelShape, precision: Precision, tokens: float, ranks: int, exchange: str) -> float:
    """Bytes that a rank sends per MoE layer under DEP, dispatch and combine together.

    ``all-to-all``: one copy per remote rank that owns one of the token's experts, (N-1)(1 -
    (1-1/N)^k) of them. ``all-copies``: one per routed copy, k (N-1)/N. ``all-gather``: every token
    to every rank, and partial sums back (SGLang's dp-attention without an all-to-all backend).
    Dispatch carries ``dispatch_bytes`` per element, combine 2 (bf16).
    """
    if exchange == "all-gather":
        return tokens * (ranks - 1) * model.hidden * 2 * 2.0
    if exchange == "all-to-all":
        copies = (ranks - 1) * (1 - (1 - 1 / ranks) ** model.top_k)
    elif exchange == "all-copies":
        copies = model.top_k * (ranks - 1) / ranks
    else:
        raise PlannerError(f"unknown exchange {exchange!r}; known: {', '.join(EXCHANGES)}")
    return tokens * copies * model.hidden * (precision.dispatch_bytes + 2.0)


def exchange_bandwidth(gpu: Gpu) -> float:
    """Bytes/s of DEP's exchange: a fraction of the link, but no more than was seen to cross it.

    Copies from several peers bound what any engine was measured to reach; on a switched fabric
    the bound is idle, on a mesh of point-to-point wires it is the tighter one.
    """
    return min(gpu.link_bandwidth * gpu.efficiency.collective, gpu.copy_bandwidth)


def expected_maximum(ranks: int) -> float:
    """Expected maximum of ``ranks`` standard normals (Blom's approximation of order statistics)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def expert_wait(model: ModelShape, gpu: Gpu, ranks: int, grouped: float) -> float:
    """Wait for the rank with the hottest experts: (max/mean - 1) of the grouped products.

    One expert's load varies by v = skew sqrt(E/k - 1): if the same k experts got every token, it
    would vary by sqrt(E/k - 1), the most that top-k routing permits. A rank's load sums E/N of
    them, so it varies by v sqrt(N/E), and the hottest of N lies ``expected_maximum`` deviations
    above the mean.
    """
    variation = gpu.expert_skew * sqrt(model.experts / model.top_k - 1)
    return grouped * variation * sqrt(ranks / model.experts) * expected_maximum(ranks)


def length_wait(base: Parts, mean: Batch, rounds: Sequence[Sequence[Batch]]) -> float:
    """Wait for the rank with the most attention and dense work, over typical rounds.

    Dense and small kernels scale with tokens, attention with pairs; the experts' products are
    shared by all ranks and do not wait for lengths.
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
    exchange: str = "all-to-all",
) -> Estimate:
    """One DEP forward, averaged over ``rounds`` (``[rounds][ranks]`` batches run in step).

    T = compute + communication + wait for the slowest rank, by lengths and by experts.
    """
    ranks = len(rounds[0])
    mean = mean_batch(rounds)
    share = max(1, round(model.experts / ranks))
    base = forward_parts(model, gpu, precision, mean, experts=share)
    if ranks == 1:
        return Estimate("dep", mean.tokens, base, base.total)
    sent = exchange_bytes(model, precision, mean.tokens, ranks, exchange)
    moved = sent / exchange_bandwidth(gpu)
    communication = model.moe_layers * (moved + 2 * gpu.kernel_gap)
    wait = length_wait(base, mean, rounds) + expert_wait(model, gpu, ranks, base.grouped_gemm)
    parts = Parts(
        base.attention,
        base.grouped_gemm,
        base.dense_gemm,
        base.other,
        communication=communication,
        synchronisation=wait,
    )
    return Estimate("dep", mean.tokens, parts, base.total)
