"""Time of one forward under DWDP, in-tree-style DWDP and plain replicas.

All times are seconds per forward of one rank unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from pydantic.dataclasses import dataclass as validated_dataclass

from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.planner import kernels
from sglang_dwdp.planner.checks import STRICT, AtLeastOne, Count, PlannerError, checked
from sglang_dwdp.planner.formats import Precision
from sglang_dwdp.planner.gpus import Gpu
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.workload import Batch

Copies = Literal["serial", "sliced"]


@dataclass(frozen=True)
class Parts:
    """Seconds of one forward by part."""

    attention: float = 0.0
    grouped_gemm: float = 0.0
    dense_gemm: float = 0.0
    other: float = 0.0
    interference: float = 0.0
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
        scheme: `dwdp`, `dep`, `replica` or `in-tree dwdp`.
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


def equal_share(model: ModelShape, ranks: int) -> int:
    """Experts on the rank that stores most, where shards are as equal as they can be."""
    placement = balanced(model.experts, ranks)
    return max(len(placement.shard(rank)) for rank in range(ranks))


@checked
@validated_dataclass(frozen=True, config=STRICT)
class Group:
    """How a group of GPUs shares the experts.

    Attributes:
        size: ranks.
        local_experts: experts that each rank stores; 0 for the smallest equal share.
        copies: `serial` whole-peer pulls in random order, or `sliced`: slices of all peers in turn, which keeps
            every source evenly loaded.
        depth: layers that are fetched ahead.
        ring_over_steps: the fetch of the next forward's first layers starts in this one.
    """

    size: AtLeastOne
    local_experts: Count = 0
    copies: Copies = "sliced"
    depth: AtLeastOne = 2
    ring_over_steps: bool = True

    def stored(self, model: ModelShape) -> int:
        """Experts that each rank stores.

        Raises:
            PlannerError: if the ranks together do not hold every expert.
        """
        share = equal_share(model, self.size)
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
    """The kernels of one forward; `experts` of each layer share the batch's routed copies.

    Under DEP a rank computes the copies of E/N experts for all ranks' tokens: as many copies as its own tokens send
    out, over fewer experts.
    """
    count = model.experts if experts is None else experts
    tokens = batch.tokens
    dense = kernels.dense_gemms(model, gpu, precision, tokens)
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

    Serial pulls use one peer at a time; sliced ones all of them together, if there are several.
    """
    if group.copies == "serial" or group.size <= 2:
        return gpu.pair_bandwidth
    return min(gpu.copy_bandwidth, gpu.pair_bandwidth * (group.size - 1))


def serial_slowdown(group_size: int, uncontended: float, window: float) -> float:
    """How much longer serial whole-peer pulls take because sources are shared.

    A pull that meets X others runs at 1/(1+X) of the rate, and E[X] = f (N-2)/(N-1) when peers copy for a fraction f of
    the time. f itself is (slowed time / period), hence the fixed point t = t0 (1 + q t / T) with q = (N-2)/(N-1), T the
    period that hides the copies; once t reaches T the copies never stop and t = t0 (1 + q).

    Args:
        uncontended: seconds t0 that the copies of one period take alone.
        window: seconds T of compute that they hide under.

    Returns:
        t / t0, at least 1.
    """
    if uncontended <= 0:
        return 1.0
    q = (group_size - 2) / (group_size - 1)
    hidden = 1 - q * uncontended / window if window > 0 else 0.0
    if hidden > 0 and uncontended / hidden <= window:
        return 1 / hidden
    return 1 + q


def dwdp(
    model: ModelShape, gpu: Gpu, precision: Precision, batch: Batch, group: Group, scheme: str = "dwdp"
) -> Estimate:
    """One DWDP forward: max(compute, fetch) per layer, plus what cannot be hidden.

    With compute C (interference included) and copies of F seconds over the MoE layers, the copy engines run ahead by
    `depth` layers at most, so dense layers hide at most `depth` fetches: T = max(C, F + max(0, D - depth f)), D the
    dense layers' time and f one layer's fetch. With one slot a copy starts when the experts of the layer before are
    done and hides under what precedes the next ones only: T = E + (n - 1) max(b, f) + max(b + D, f), E the experts'
    products, b the rest of one of n MoE layers. Without the ring over steps the first fetch starts with the forward and
    is hidden by D and one attention block only. Interference costs `copy_interference` seconds of compute per second
    of copying at full rate: power and HBM bandwidth go to each byte copied (paper, appendix A).
    """
    base = forward_parts(model, gpu, precision, batch)
    total_bytes = layer_fetch_bytes(model, precision, group) * model.moe_layers
    if total_bytes == 0:
        return Estimate(scheme, batch.tokens, base, base.total)
    alone = total_bytes / pull_bandwidth(gpu, group)
    interference = gpu.copy_interference * total_bytes / max(gpu.copy_bandwidth, gpu.pair_bandwidth)
    compute = base.total + interference
    contended = group.copies == "serial" and gpu.switched and group.size > 2
    slowdown = serial_slowdown(group.size, alone, compute) if contended else 1.0
    fetch = alone * slowdown
    per_layer = fetch / model.moe_layers
    dense = (base.total - base.grouped_gemm) * model.dense_layers / model.layers
    bound = fetch + max(0.0, dense - group.depth * per_layer)
    if group.depth == 1:
        before = (compute - dense - base.grouped_gemm) / model.moe_layers
        bound = base.grouped_gemm + (model.moe_layers - 1) * max(before, per_layer) + max(before + dense, per_layer)
    cold = 0.0
    if not group.ring_over_steps:
        first = dense + (compute - base.grouped_gemm) / model.layers
        cold = max(0.0, per_layer - first)
    exposed = max(0.0, bound - compute) + cold
    parts = replace(base, interference=interference, exposed_copy=exposed)
    return Estimate(scheme, batch.tokens, parts, compute, fetch, total_bytes)


def replica(model: ModelShape, gpu: Gpu, precision: Precision, batch: Batch) -> Estimate:
    """One forward of all layers and experts on one GPU."""
    base = forward_parts(model, gpu, precision, batch)
    return Estimate("replica", batch.tokens, base, base.total)
