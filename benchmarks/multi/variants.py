"""The ways to serve that are compared, as arguments of `sglang.Engine` and variables of their processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.multi.workload import Load
from benchmarks.one_gpu import one_gpu_environment
from sglang_dwdp.cpu import engine as cpu_engine

OURS, IN_TREE, DEP, REPLICAS = "dwdp", "in-tree", "dep", "replicas"
DEEPEP, DEEPEP_NORMAL = WITH_DEEPEP = ("deepep", "deepep-normal")
DEFAULT = (OURS, IN_TREE, DEP, REPLICAS)
ON_CPU = (OURS, REPLICAS)
VARIANTS = (*DEFAULT, DEEPEP, "dwdp-direct", "dwdp-staged", DEEPEP_NORMAL)  # an engine's ports go by its place here
REFERENCE = (REPLICAS, DEP, IN_TREE, OURS)  # whose tokens the others' are compared with: the first that came up
REQUIRED_MODULE = dict.fromkeys(WITH_DEEPEP, "deep_ep")
# NVSHMEM has no other host to reach here, and DeepGEMM compiles only what comes, during warm-up.
DEEPEP_ENVIRONMENT = {"NVSHMEM_REMOTE_TRANSPORT": "none", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}


def kind_options(name: str, ranks: int) -> dict[str, Any]:
    """What makes an engine that variant.

    The exchange of tokens under expert parallelism is SGLang's default, all-gather and reduce-scatter; `deepep` is
    the same with DeepEP's all-to-all, for which SGLang runs bf16 experts with DeepGEMM alone; `deepep-normal` has its
    kernels for prefills only, which need no NVSHMEM, and so no graphs. None of them shards the language model's head
    or dense layers, as DWDP does not.
    """
    experts = {"attn_dp_size": ranks, "ep_size": ranks, "enable_dp_lm_head": True, "moe_dense_tp_size": 1}
    # A rank that sleeps notices a peer's request up to a second late, and the peer waits for it.
    experts["sleep_on_idle"] = False
    deepep = {"moe_a2a_backend": "deepep", "moe_runner_backend": "deep_gemm"}
    kinds: dict[str, dict[str, Any]] = {
        OURS: {"tp_size": ranks, "enable_dwdp": True},
        "dwdp-direct": {"tp_size": ranks, "enable_dwdp": True, "dwdp_view": "direct"},
        "dwdp-staged": {"tp_size": ranks, "enable_dwdp": True, "dwdp_view": "staged"},
        IN_TREE: {"tp_size": ranks, "dwdp_size": ranks},
        DEP: {"tp_size": ranks, **experts},
        DEEPEP: {"tp_size": ranks, **experts, **deepep},
        DEEPEP_NORMAL: {"tp_size": ranks, **experts, **deepep, "deepep_mode": "normal"},
        REPLICAS: {"tp_size": 1, "dp_size": ranks},
    }
    return kinds[name]


def engine_options(name: str, ranks: int, load: Load, model: str, *, cpu: bool, attention: str) -> dict[str, Any]:
    """All arguments.

    Every variant gets the same chunk on a rank, one prompt in each prefill, and the same cache and number of running
    requests. SGLang divides the chunk by the ranks of attention data parallelism, its own DWDP included (this plugin
    keeps it), and the running requests by them in every case.
    """
    kind = kind_options(name, ranks)
    chunk_factor = ranks if name in (IN_TREE, DEP, *WITH_DEEPEP) else 1
    options: dict[str, Any] = {
        "model_path": model,
        "chunked_prefill_size": load.chunk * chunk_factor,
        "max_prefill_tokens": load.chunk,
        "prefill_max_requests": 1,
        "max_total_tokens": load.cached_tokens,
        "max_running_requests": 2 * max(load.decodes) * kind["tp_size"],
        "random_seed": 1,
    }
    if cpu:
        only_cpu = {"dtype": "float32", "skip_server_warmup": True, "max_total_tokens": 8192}
        if name == OURS:  # so that the longer prefills are staged, as they are on GPUs
            only_cpu["dwdp_direct_max_tokens"] = 64
        return {**cpu_engine.default_flags(), **options, **only_cpu, **kind}
    only_gpus = {
        "attention_backend": attention,
        "moe_runner_backend": "triton",
        "disable_custom_all_reduce": True,
        "cuda_graph_backend_prefill": "disabled",
        "cuda_graph_bs_decode": list(load.decodes),  # no others are used, and capturing them takes long
        "mem_fraction_static": 0.97,  # of what the other engines leave; the cache's size is given
    }
    return {**options, **only_gpus, **kind}


def environment(name: str, ranks: int, devices: int, directory: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Variables to add for a variant's processes. devices: GPUs; 0 for the CPU engine, 1 for a GPU that ranks share.

    directory: where a plugin for ranks that share a GPU is written.  base: the variables that these are added to.
    """
    from sglang_dwdp.demo.server import fewer_models

    # Engines that load at the same time make GPUs look unevenly used, which SGLang refuses otherwise.
    added = {**fewer_models(), "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    if name in WITH_DEEPEP:
        added |= DEEPEP_ENVIRONMENT
    if not devices:
        return added | cpu_engine.environment(ranks, base)
    return added | (one_gpu_environment(directory, base) if devices == 1 else {})


def why_not(name: str, ranks: int, devices: int) -> str | None:
    """Why a variant cannot run here, before it is tried; None if it may."""
    module = REQUIRED_MODULE.get(name)
    if not devices and name not in ON_CPU:
        return "it needs GPUs"  # dep too: SGLang 0.5.23's torch_native attention lacks what it pads batches with
    if devices > 1 and ranks > devices:
        return f"{ranks} ranks need {ranks} GPUs, there are {devices}"
    if module and importlib.util.find_spec(module) is None:
        return f"the Python module {module} is not installed"
    return None
