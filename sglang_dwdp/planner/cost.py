"""Time of one forward under DWDP, DEP, plain replicas and in-tree-style DWDP.

DEP is dp-attention with expert parallelism: attention on each rank's own tokens, tokens sent to
the ranks that own their experts and back, all ranks in step. All times are seconds per forward
of one rank unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import sqrt
from statistics import NormalDist

import numpy as np

from . import kernels
from .contention import serial_slowdown
from .errors import PlannerError
from .formats import Precision
from .gpus import Gpu
from .models import ModelShape
from .workload import Batch, mean_batch

COPY_POLICIES = ("serial", "sliced")
EXCHANGES = ("all-to-all", "all-gather", "all-copies")


@dataclass(frozen=True)
class Parts:
    """Seconds of one forward by part."""

    attention: float = 0.0
    grouped_gemm: float = 0.0
    dense_gemm: float = 0.0
    other: float = 0.0
    interference: float = 0.0
    merge: float = 0.0
    communication: float = 0.0
    synchronisation: float = 0.0
    exposed_copy: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Estimate:
    """One forward under one scheme.

    Attributes:
        scheme: ``dwdp``, ``dep``, ``replica`` or ``in-tree dwdp``.
        tokens: tokens of the forward on one rank.
        parts: seconds by part.
        compute: seconds of the rank's own kernels, interference included.
        fetch: seconds that the copies take while they run (0 without copies).
        fetch_bytes: bytes that one rank pulls.
    """

    scheme: str
    tokens: float
    parts: Parts
    compute: float
    fetch: float = 0.0
    fetch_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the forward."""
        return self.parts.total

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Group:
    """How a group of GPUs shares the experts.

    Attributes:
        size: ranks.
        local_experts: experts that each rank stores; 0 for the smallest equal share.
        copies: ``serial`` whole-peer pulls in random order, or ``sliced``: slices of all peers in
            turn, which keeps every source evenly loaded.
        depth: layers that are fetched ahead.
        ring_over_steps: the fetch of the next forward's first layers starts in this one.
        merge_copy: local experts are copied beside the fetched ones before every product (the
            paper's naive version, and any runtime without a contiguous view).
    """

    size: int
    local_experts: int = 0
    copies: str = "sliced"
    depth: int = 2
    ring_over_steps: bool = True
    merge_copy: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PlannerError(f"a group has at least 1 rank, not {self.size}")
        if self.copies not in COPY_POLICIES:
            raise PlannerError(f"unknown copy policy {self.copies!r}; known: {', '.join(COPY_POLICIES)}")
        if self.depth < 1:
            raise PlannerError(f"prefetch depth must be at least 1 layer, not {self.depth}")

    def stored(self, model: ModelShape) -> int:
        """Experts that each rank stores.

        Raises:
            PlannerError: if the ranks together do not hold every expert.
        """
        share = -(-model.experts // self.size)
        stored = self.local_experts or share
        if not share <= stored <= model.experts:
            raise PlannerError(
                f"{stored} local experts on {self.size} ranks: {model.name} has {model.experts} experts, "
                f"so a rank stores {share} to {model.experts}"
            )
        return stored


def in_tree_group(size: int) -> Group:
    """SGLang's own DWDP: serial whole-peer copies, two buffers, a cold start in every step."""
    return Group(size, copies="serial", depth=2, ring_over_steps=False)


def forward_parts(model: ModelShape, gpu: Gpu, precision: Precision, batch: Batch, experts: int | None = None) -> Parts:
    """The kernels of one forward; ``experts`` of each layer share the batch's routed copies.

    Under DEP a rank computes the copies of E/N experts for all ranks' tokens: as many copies as
    its own tokens send out, over fewer experts.
    """
    count = model.experts if experts is None else experts
    tokens = batch.tokens
    dense = model.layers * kernels.projections(model, gpu, precision, tokens)
    dense += model.dense_layers * kernels.dense_mlp(model, gpu, precision, tokens)
    dense += model.moe_layers * kernels.shared_and_router(model, gpu, precision, tokens)
    rows = tokens * model.top_k
    grouped = model.moe_layers * kernels.grouped_gemm(model, gpu, precision.experts, rows, count)
    other = model.moe_layers * kernels.elementwise(model, gpu, precision, tokens, moe=True)
    other += model.dense_layers * kernels.elementwise(model, gpu, precision, tokens, moe=False)
    return Parts(kernels.attention(model, gpu, precision, batch), grouped, dense, other)


def layer_fetch_bytes(model: ModelShape, precision: Precision, group: Group) -> float:
    """Bytes that a rank pulls per MoE layer: (E - local) experts."""
    remote = model.experts - group.stored(model)
    return remote * model.expert_params * precision.experts.bytes_per_param


def pull_bandwidth(gpu: Gpu, group: Group) -> float:
    """Bytes/s of a rank's copies when nobody else reads its sources.

    Serial pulls use one peer at a time; sliced ones all of them together.
    """
    if group.copies == "serial":
        return gpu.pair_bandwidth
    return min(gpu.copy_bandwidth, gpu.pair_bandwidth * max(1, group.size - 1))


def dwdp(
    model: ModelShape,
    gpu: Gpu,
    precision: Precision,
    batch: Batch,
    group: Group,
    scheme: str = "dwdp",
) -> Estimate:
    """One DWDP forward: max(compute, fetch) per layer, plus what cannot be hidden.

    With compute C (interference included) and copies of F seconds over the MoE layers, the copy
    engines run ahead by ``depth`` layers at most, so dense layers hide at most ``depth`` fetches:
    T = max(C, F + max(0, D - depth f)), D the dense layers' time and f one layer's fetch. Without
    the ring over steps the first fetch starts with the forward and is hidden by D and one
    attention block only. Interference costs ``copy_interference`` seconds of compute per second
    of copying at full rate: power and HBM bandwidth go to each byte copied (paper, appendix A).
    """
    base = forward_parts(model, gpu, precision, batch)
    size = layer_fetch_bytes(model, precision, group)
    total_bytes = size * model.moe_layers
    if total_bytes == 0:
        return Estimate(scheme, batch.tokens, base, base.total)
    alone = total_bytes / pull_bandwidth(gpu, group)
    merge = 0.0
    if group.merge_copy:  # local experts are read, and written beside the fetched ones
        local = group.stored(model) * model.expert_params * precision.experts.bytes_per_param
        merge = 2 * local * model.moe_layers / (gpu.hbm_bandwidth * gpu.efficiency.elementwise)
    interference = gpu.copy_interference * alone
    compute = base.total + interference + merge
    contended = group.copies == "serial" and gpu.switched and group.size > 2
    slowdown = serial_slowdown(group.size, alone, compute) if contended else 1.0
    fetch = alone * slowdown
    per_layer = fetch / model.moe_layers
    dense = compute * model.dense_layers / model.layers
    bound = fetch + max(0.0, dense - group.depth * per_layer)
    cold = 0.0
    if not group.ring_over_steps:
        first = dense + (compute - base.grouped_gemm) / model.layers
        cold = max(0.0, per_layer - first)
    exposed = max(0.0, bound - compute) + cold
    parts = Parts(
        base.attention,
        base.grouped_gemm,
        base.dense_gemm,
        base.other,
        interference=interference,
        merge=merge,
        exposed_copy=exposed,
    )
    return Estimate(scheme, batch.tokens, parts, compute, fetch, total_bytes)


def replica(model: ModelShape, gpu: Gpu, precision: Precision, batch: Batch) -> Estimate:
    """One forward of a whole model on one GPU."""
    base = forward_parts(model, gpu, precision, batch)
    return Estimate("replica", batch.tokens, base, base.total)


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

    A rank's load sums E/N experts whose loads vary by ``expert_skew``, so it varies by
    skew sqrt(N/E), and the hottest of N lies ``expected_maximum`` deviations above the mean.
    """
    return grouped * gpu.expert_skew * sqrt(ranks / model.experts) * expected_maximum(ranks)


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
