"""The GPUs that the planner knows, each figure with its source, and how users and drivers call them."""

from __future__ import annotations

from .errors import PlannerError
from .gpu import Efficiency, Gpu

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
_HOPPER_GAP = 2.65e-6
_HOPPER_PEAKS = {"bf16": 989.4e12, "fp8": 1978.9e12}
_BLACKWELL_EFFICIENCY = Efficiency(
    grouped_gemm=0.3584, dense_gemm=0.5183, attention=0.4054, elementwise=0.6765, collective=0.7456
)
_ASSUMED = (
    "; weight_read and tile_rows are not published (two profiles of one H100 gave 0.78 and 0.84, 128 and 256 rows)"
)


def _sources(sheet: str, link: str, copies: str, efficiency: str, gap: str, own: str) -> dict[str, str]:
    """``own`` says whose Table 1 is where it is not this GPU's."""
    return {
        **dict.fromkeys(("memory", "hbm_bandwidth"), sheet),
        "peak_flops": f"{sheet}, dense: half of the figures with sparsity",
        **dict.fromkeys(("link_bandwidth", "max_group", "switched"), link),
        **dict.fromkeys(("copy_bandwidth", "pair_bandwidth"), copies),
        "efficiency": efficiency,
        "copy_interference": own + _TABLE_1,
        "expert_skew": f"a property of model and traffic, {_TABLE_1}",
        "kernel_gap": gap,
    }


_HOPPER_SOURCES = _sources(
    "NVIDIA H100 / H200 data sheet, SXM",
    "NVLink 4: 900 GB/s both ways, HGX boards of 8 (data sheet)",
    "380 of 450 GB/s one way, copy engine, H100 SXM (NVIDIA/nccl#1264)",
    "measured on one H100 (benchmarks/results/profile_h100.json), PyTorch's kernels; attention: FlashAttention-3, "
    "about 600 of 989 TFLOP/s forward causal (arXiv 2407.08608); collective: as GB200",
    "measured on one H100 (benchmarks/results/profile_h100.json)",
    "not published for Hopper; GB200's by ",
)
_BLACKWELL_GAP = "assumed, a little below an H100's 2.65 us"


GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu(
            name="H100",
            memory=80e9,
            hbm_bandwidth=3.35e12,
            peak_flops=_HOPPER_PEAKS,
            link_bandwidth=450e9,
            copy_bandwidth=380e9,
            pair_bandwidth=380e9,
            efficiency=_HOPPER_EFFICIENCY,
            max_group=8,
            copy_interference=_INTERFERENCE,
            expert_skew=_SKEW,
            kernel_gap=_HOPPER_GAP,
            direct_read=338e9,
            sources=_HOPPER_SOURCES
            | {
                "direct_read": "measured on two H100s that read at once, a Triton grouped product "
                "(benchmarks/results/multi_gpu_2xh100_copies.json)"
            },
        ),
        Gpu(
            name="H200",
            memory=141e9,
            hbm_bandwidth=4.8e12,
            peak_flops=_HOPPER_PEAKS,
            link_bandwidth=450e9,
            copy_bandwidth=380e9,
            pair_bandwidth=380e9,
            efficiency=_HOPPER_EFFICIENCY,
            max_group=8,
            copy_interference=_INTERFERENCE,
            expert_skew=_SKEW,
            kernel_gap=_HOPPER_GAP,
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
            sources=_sources(
                "NVIDIA HGX B200 data sheet",
                "NVLink 5: 1,800 GB/s both ways, HGX boards of 8 (data sheet)",
                f"as GB200: {_TABLE_1}",
                f"as GB200: {_TABLE_1}{_ASSUMED}",
                _BLACKWELL_GAP,
                "as GB200: ",
            ),
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
            sources=_sources(
                "NVIDIA GB200 NVL72 data sheet, per GPU",
                "NVLink 5: 1,800 GB/s both ways, 72 GPUs (data sheet)",
                _TABLE_1,
                f"{_TABLE_1}{_ASSUMED}",
                _BLACKWELL_GAP,
                "",
            ),
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
            sources=_sources(
                "AMD Instinct MI355X data sheet",
                "7 Infinity Fabric links of 76.8 GB/s one way, a mesh of 8 (data sheet)",
                "169.2 GiB/s from three peers together, SGLang's ROCm DWDP results (sgl-project/sglang#33310); "
                "pair_bandwidth is a third of it",
                f"not published; the fractions of {_TABLE_1}{_ASSUMED}",
                _BLACKWELL_GAP,
                "not published; GB200's by ",
            )
            | {"peak_flops": "AMD Instinct MI355X data sheet, dense"},
        ),
    )
}
_ALIASES = {"h100-sxm": "h100", "h200-sxm": "h200", "gb200-nvl72": "gb200"}


def get_gpu(name: str) -> Gpu:
    """The GPU called ``name``, or as its driver calls it (case and a few aliases do not matter).

    Raises:
        PlannerError: for an unknown name, with the known ones.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    key = _ALIASES.get(key, key)
    named = gpu_of_device(name)
    if key not in GPUS and named is not None:
        return named
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
