"""What the cost model wants to know of a GPU: peaks, links, and which fraction kernels reach.

Peaks are dense (no structured sparsity). ``link_bandwidth`` counts one direction. ``gpus.py`` has the known GPUs;
every efficiency can be replaced by a measured profile (see ``profile.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .errors import PlannerError
from .formats import WeightFormat


@dataclass(frozen=True)
class Efficiency:
    """Fractions of peak that kernels reach, and what limits small problems.

    Attributes:
        grouped_gemm, dense_gemm, attention: fraction of the matrix peak, for large problems.
        elementwise: fraction of HBM bandwidth reached by norms, activations, permutations.
        weight_read: fraction of HBM bandwidth reached by a product bound by reading weights.
        collective: fraction of link bandwidth reached by all-to-all, all-gather, reduce-scatter.
        tile_rows: rows that a grouped product is padded to; half of it is lost per expert.
        half_depth: inner dimension at which a grouped product reaches half of its rate (pipeline
            fill).
        gemm_cap: fraction of the matrix peak that long large products sustain within the power limit.
        gemm_latency: seconds that every product costs whatever its size.
        overlap_power: p in (compute^p + memory^p)^(1/p), how well a product's weight reads hide
            under its arithmetic; infinite for the plain maximum.
        attention_half: prologue of attention: length at which it costs as much as the products.
        attention_fill: tail of attention: the same for heads x length (the last blocks of a
            causal grid leave multiprocessors idle).
        softmax_pair: seconds per (query, key) pair and head that attention spends outside its two
            products (exponentials); it weighs more the smaller the head.
    """

    grouped_gemm: float
    dense_gemm: float
    attention: float
    elementwise: float
    weight_read: float = 0.85
    collective: float = 0.75
    tile_rows: int = 128
    half_depth: float = 0.0
    gemm_cap: float = 1.0
    gemm_latency: float = 0.0
    overlap_power: float = float("inf")
    attention_half: float = 0.0
    attention_fill: float = 0.0
    softmax_pair: float = 0.0


@dataclass(frozen=True)
class Gpu:
    """One GPU model.

    Attributes:
        memory: bytes of HBM that a process can use.
        hbm_bandwidth: bytes/s.
        peak_flops: FLOP/s by compute format (``bf16``, ``fp8``, ``fp4``).
        link_bandwidth: bytes/s to all peers together, one direction, data sheet.
        copy_bandwidth: bytes/s that copy engines pull from several peers together.
        pair_bandwidth: bytes/s that they pull from one peer.
        switched: peers share each GPU's port through a switch (a busy source slows its
            readers); otherwise every pair has its own wire.
        copy_interference: seconds of compute lost per second of copying under it.
        expert_skew: how much experts' loads vary, as a fraction of the most that top-k routing
            permits (0: evenly loaded, as EPLB strives for); under DEP it explains the wait for the
            slowest rank that sequence lengths do not. A property of model and traffic more than of
            the GPU; it stands here because Table 1 is its one source.
        kernel_gap: seconds between dependent kernels.
        direct_read: bytes/s at which kernels were measured to read a peer's memory in place; 0 where they were not.
        max_group: GPUs that the links join.
        sources: where each figure comes from.
    """

    name: str
    memory: float
    hbm_bandwidth: float
    peak_flops: Mapping[str, float]
    link_bandwidth: float
    copy_bandwidth: float
    pair_bandwidth: float
    efficiency: Efficiency
    max_group: int
    switched: bool = True
    copy_interference: float = 0.0
    expert_skew: float = 0.0
    kernel_gap: float = 2e-6
    direct_read: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def peak(self, fmt: WeightFormat) -> float:
        """FLOP/s at which weights of ``fmt`` are multiplied, before efficiency."""
        if fmt.compute in self.peak_flops:
            return self.peak_flops[fmt.compute]
        if fmt.weight_only or fmt.compute == "bf16":
            return self.peak_flops["bf16"]
        raise PlannerError(f"{self.name} has no {fmt.compute} matrix units for weights in {fmt.name}")

    @property
    def direct_read_bandwidth(self) -> float:
        """Bytes/s at which a kernel reads a peer's memory in place: as measured, else from packet sizes.

        Kernels move 128 B of payload per packet, copy engines 256 B (an NCCL maintainer in
        NVIDIA/nccl-tests#149). The header share that explains the copy engine's efficiency e
        on its payload, h = 256 (1/e - 1), then costs a kernel 128 / (128 + h).
        """
        if self.direct_read:
            return self.direct_read
        copy_efficiency = min(1.0, self.copy_bandwidth / self.link_bandwidth)
        header = 256 * (1 / copy_efficiency - 1)
        return self.link_bandwidth * 128 / (128 + header)


def roofline_gpu(gpu: Gpu) -> Gpu:
    """``gpu`` with every efficiency at 1 and no overheads: the paper's section 3 roofline."""
    ideal = Efficiency(1.0, 1.0, 1.0, 1.0, weight_read=1.0, collective=1.0, tile_rows=0)
    return replace(
        gpu,
        name=f"{gpu.name} (roofline)",
        copy_bandwidth=gpu.link_bandwidth,
        pair_bandwidth=gpu.link_bandwidth,
        efficiency=ideal,
        copy_interference=0.0,
        expert_skew=0.0,
        kernel_gap=0.0,
    )
