"""What one simulated forward takes before anything waits for anything: pure arithmetic on a scenario."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cost import forward_parts, layer_fetch_bytes, pull_bandwidth
from .dep import exchange_bandwidth, exchange_bytes, expert_wait
from .kernels import elementwise
from .scenario import Scenario
from .workload import Batch


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one rank's kernels.

    Attributes:
        dense: all dense layers together.
        before: of each MoE layer, what precedes the experts; interference of copies and merge copies included.
        experts: of each MoE layer, the experts' products.
    """

    dense: float
    before: float
    experts: float


def layer_times(s: Scenario, batch: Batch) -> LayerTimes:
    """A forward of DWDP or of a replica."""
    base = forward_parts(s.model, s.gpu, s.precision, batch)
    local = base.attention + base.dense_gemm + base.other
    share = s.model.dense_layers / s.model.layers
    moe = max(1, s.model.moe_layers)
    extra = 0.0
    if s.mode == "dwdp":
        size = layer_fetch_bytes(s.model, s.precision, s.group)
        extra = s.gpu.copy_interference * size / pull_bandwidth(s.gpu, s.group)
        if s.merge_copy:
            stored = s.group.stored(s.model) * s.model.expert_params
            moved = 2 * stored * s.precision.experts.bytes_per_param
            extra += moved / (s.gpu.hbm_bandwidth * s.gpu.efficiency.elementwise)
    return LayerTimes(
        local * share * s.slowdown,
        (local * (1 - share) / moe + extra) * s.slowdown,
        base.grouped_gemm / moe * s.slowdown,
    )


@dataclass(frozen=True)
class DepTimes:
    """Seconds of one DEP forward.

    Attributes:
        own: of each rank: its own kernels and its share of the experts' products.
        hot_experts: what all wait for the rank with the hottest experts.
        exchange: tokens on their way, over all layers.
    """

    own: tuple[float, ...]
    hot_experts: float
    exchange: float


def dep_forward(s: Scenario, batches: Sequence[Batch]) -> DepTimes:
    """A forward of a DEP group; the experts' products are shared, whoever sent the tokens.

    A rank without tokens still launches its kernels: ``elementwise`` at zero tokens is the gaps.
    """
    n = len(batches)
    tokens = sum(b.tokens for b in batches) / n
    share = max(1, round(s.model.experts / n))
    grouped = forward_parts(s.model, s.gpu, s.precision, Batch(tokens, 0.0), experts=share).grouped_gemm
    idle = s.model.layers * elementwise(s.model, s.gpu, s.precision, 0.0, moe=True)
    own = []
    for batch in batches:
        parts = forward_parts(s.model, s.gpu, s.precision, batch) if batch.tokens else None
        own.append(parts.attention + parts.dense_gemm + parts.other if parts else idle)
    exchange = 0.0
    if n > 1:
        sent = exchange_bytes(s.model, s.precision, tokens, n, s.exchange)
        exchange = s.model.moe_layers * (sent / exchange_bandwidth(s.gpu) + 2 * s.gpu.kernel_gap)
    return DepTimes(
        tuple((seconds + grouped) * s.slowdown for seconds in own),
        expert_wait(s.model, s.gpu, n, grouped) * s.slowdown,
        exchange,
    )
