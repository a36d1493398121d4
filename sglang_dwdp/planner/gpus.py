"""What the cost model knows about GPUs: data-sheet peaks, and which fraction kernels reach.

Peaks are dense (no structured sparsity). ``link_bandwidth`` counts one direction. Every
efficiency can be replaced by a measured profile (see ``profile.py``).
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
        """Bytes/s at which a kernel reads a peer's memory in place.

        Kernels move 128 B of payload per packet, copy engines 256 B (an NCCL maintainer in
        NVIDIA/nccl-tests#149). The header share that explains the copy engine's efficiency e
        on its payload, h = 256 (1/e - 1), then costs a kernel 128 / (128 + h).
        """
        copy_efficiency = min(1.0, self.copy_bandwidth / self.link_bandwidth)
        header = 256 * (1 / copy_efficiency - 1)
        return self.link_bandwidth * 128 / (128 + header)


# Interference on Hopper and MI355X was not published. What is known is Table 1 of the paper on
# GB200: about 80 ms of compute lost to copies that would take 345 ms alone (see calibrate.py).
_INTERFERENCE = 0.2404
_SKEW = 0.3939
_TABLE_1 = "paper Table 1 (arXiv 2604.01621), by calibrate.py"
# Products and small kernels: fitted to benchmarks/results/profile_h100.json (PyTorch 2.11, bf16).
# Attention: FlashAttention-3, SGLang's default on Hopper, which PyTorch does not have.
_HOPPER_EFFICIENCY = Efficiency(
    grouped_gemm=0.90,
    dense_gemm=0.775,
    attention=0.60,
    elementwise=0.495,
    weight_read=0.78,
    half_depth=450.0,
    gemm_cap=0.689,
    gemm_latency=5e-6,
    overlap_power=2.0,
)
_HOPPER_SOURCES = {
    "peak_flops": "NVIDIA H100 / H200 data sheets, SXM, half of the figures with sparsity",
    "link_bandwidth": "NVLink 4: 900 GB/s both ways (data sheet)",
    "copy_bandwidth": "380 of 450 GB/s one way, copy engine, H100 SXM (NVIDIA/nccl#1264)",
    "efficiency": "measured on one H100 (benchmarks/results/profile_h100.json), PyTorch's kernels; "
    "attention: FlashAttention-3, about 600 of 989 TFLOP/s forward causal (arXiv 2407.08608)",
    "copy_interference": f"not published for Hopper; taken from {_TABLE_1}",
}
_BLACKWELL_EFFICIENCY = Efficiency(
    grouped_gemm=0.3584, dense_gemm=0.5183, attention=0.4054, elementwise=0.6765, collective=0.7456
)

GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu(
            name="H100",
            memory=80e9,
            hbm_bandwidth=3.35e12,
            peak_flops={"bf16": 989.4e12, "fp8": 1978.9e12},
            link_bandwidth=450e9,
            copy_bandwidth=380e9,
            pair_bandwidth=380e9,
            efficiency=_HOPPER_EFFICIENCY,
            max_group=8,
            copy_interference=_INTERFERENCE,
            expert_skew=_SKEW,
            sources=_HOPPER_SOURCES,
        ),
        Gpu(
            name="H200",
            memory=141e9,
            hbm_bandwidth=4.8e12,
            peak_flops={"bf16": 989.4e12, "fp8": 1978.9e12},
            link_bandwidth=450e9,
            copy_bandwidth=380e9,
            pair_bandwidth=380e9,
            efficiency=_HOPPER_EFFICIENCY,
            max_group=8,
            copy_interference=_INTERFERENCE,
            expert_skew=_SKEW,
            sources=_HOPPER_SOURCES,
        ),
        Gpu(
            name="B200",
            memory=180e9,
            hbm_bandwidth=8.0e12,
            peak_flops={"bf16": 2.25e15, "fp8": 4.5e15, "fp4": 9.0e15},
            link_bandwidth=900e9,
            copy_bandwidth=801e9,
            pair_bandwidth=801e9,
            efficiency=_BLACKWELL_EFFICIENCY,
            max_group=8,
            copy_interference=_INTERFERENCE,
            expert_skew=_SKEW,
            sources={
                "peak_flops": "NVIDIA HGX B200 data sheet, half of the figures with sparsity",
                "copy_bandwidth": f"as GB200: {_TABLE_1}",
                "efficiency": f"as GB200: {_TABLE_1}",
            },
        ),
        Gpu(
            name="GB200",
            memory=186e9,
            hbm_bandwidth=8.0e12,
            peak_flops={"bf16": 2.5e15, "fp8": 5.0e15, "fp4": 10.0e15},
            link_bandwidth=900e9,
            copy_bandwidth=801e9,
            pair_bandwidth=801e9,
            efficiency=_BLACKWELL_EFFICIENCY,
            max_group=72,
            copy_interference=_INTERFERENCE,
            expert_skew=_SKEW,
            sources={
                "peak_flops": "NVIDIA GB200 NVL72 data sheet per GPU, half of the figures with sparsity",
                "link_bandwidth": "NVLink 5: 1,800 GB/s both ways (data sheet)",
                "copy_bandwidth": f"{_TABLE_1}",
                "efficiency": f"{_TABLE_1}",
            },
        ),
        Gpu(
            name="MI355X",
            memory=288e9,
            hbm_bandwidth=8.0e12,
            peak_flops={"bf16": 2.5e15, "fp8": 5.0e15, "fp4": 10.1e15},
            link_bandwidth=537.6e9,
            copy_bandwidth=181.7e9,
            pair_bandwidth=60.6e9,
            efficiency=_BLACKWELL_EFFICIENCY,
            max_group=8,
            switched=False,
            copy_interference=_INTERFERENCE,
            expert_skew=_SKEW,
            sources={
                "peak_flops": "AMD Instinct MI355X data sheet",
                "link_bandwidth": "7 Infinity Fabric links of 76.8 GB/s one way (data sheet)",
                "copy_bandwidth": "169.2 GiB/s from three peers together, SGLang's ROCm DWDP results "
                "(sgl-project/sglang#33310); pair_bandwidth is a third of it",
                "efficiency": f"not published; the fractions of {_TABLE_1}",
            },
        ),
    )
}
_ALIASES = {"h100-sxm": "h100", "h200-sxm": "h200", "gb200-nvl72": "gb200"}


def get_gpu(name: str) -> Gpu:
    """The GPU called ``name`` (case and a few aliases do not matter).

    Raises:
        PlannerError: for an unknown name, with the known ones.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    key = _ALIASES.get(key, key)
    if key not in GPUS:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise PlannerError(
            f"unknown GPU {name!r}; known: {known}. For another GPU measure a profile with "
            "`sglang-dwdp profile` and pass it with --profile."
        )
    return GPUS[key]


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that a driver calls ``device_name`` ("NVIDIA H100 80GB HBM3"), None where it is not known.

    Boards with another link (H100 PCIe, H100 NVL), parts of a GPU (MIG), and chips that merely have
    a known one's letters in their name (GH200) are other GPUs.
    """
    words = set(device_name.upper().replace("-", " ").split())
    if words & {"PCIE", "NVL", "MIG"}:
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name in words), None)


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
