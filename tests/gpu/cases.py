"""The models that are compared on GPUs: family, weight format, MoE backend, sizes, numbers of ranks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tests.fixtures.families import Family
from tests.fixtures.quantized import Quantization

# Sizes that kernels for GPUs take: heads as in the released models, multiples of 128 for blocks of FP8. 14 experts
# over 3 ranks are shards of different sizes; an expert's bytes are no whole number of pages, so ranks share pages.
BASE = {
    "num_layers": 4,  # more MoE layers than slots, also where the first layer is dense
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 128,
    "num_experts": 14,
    "top_k": 4,
}
LATENT = {"kv_lora_rank": 512, "q_lora_rank": 256, "rope_head_dim": 64}
# As DeepSeek-R1 and Kimi K2 route: 256 experts in 8 groups, and 384 without groups; both choose 8.
R1 = {**BASE, **LATENT, "num_experts": 256, "moe_intermediate_size": 128, "top_k": 8}
K2 = {**R1, "num_experts": 384}
# Like gpt-oss's own sizes, these are no multiples of 128, so experts are padded after loading.
GPT_OSS = {**BASE, "hidden_size": 576, "moe_intermediate_size": 320, "head_dim": 64}

# Heads as released. SGLang would take most of a GPU's memory for states, on each rank; this is divided by the ranks.
STATES = {"max_mamba_cache_size": 192}
GRANITE_4 = {**BASE, "num_heads": 4, "states": 1}
QWEN3_NEXT = {**BASE, "num_heads": 4, "head_dim": 256}

# Sparse attention has kernels of its own, for as many heads as are released.
SPARSE = {**BASE, **LATENT, "num_heads": 64}
DSA = {"attention_backend": "dsa", "page_size": 64}

# The bits of a sum of atomics differ from call to call, and tactics would be chosen by timing.
FIXED = {"disable_flashinfer_autotune": True}
NO_ATOMICS = {"SGLANG_FLASHINFER_MOE_FUSED_FINALIZE": "0"}  # Marlin's, which have no variable: see `test_models`
# Which layout DeepGEMM runs on depends on free memory otherwise.
MASKED, COMPACT = ({"SGLANG_DEEPGEMM_STANDARD_LAYOUT": name} for name in ("masked", "compact"))

HALF = {"dtype": "float16"}  # GPTQ's scales are, and Marlin wants activations of their type


@dataclass(frozen=True)
class Case:
    """One model.

    kernels: the format of FlashInfer's kernels that it needs (`kernels/build.py`).
    logged: what a rank's log says of its layers.
    share_all: on 3 ranks scales and biases are shared like weights, however small they are.
    tuned: kernels of its layers are chosen by timing, which the tests turn off.
    variation: a word for `dwdp`, which are options of the engines with DWDP only.
    drafts: a word for how the model is drafted for, in `options`.
    head: the draft model, where it is one of its own.
    """

    family: Family
    weights: str
    backend: str
    logged: str
    shape: Mapping[str, int] = field(default_factory=lambda: BASE)
    ranks: tuple[int, ...] = (2, 3)
    kernels: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    share_all: bool = False
    tuned: bool = False
    variation: str = ""
    drafts: str = ""
    head: Literal["", "eagle", "eagle3"] = ""
    dwdp: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> Quantization:
        """As `make_checkpoint` takes it."""
        formats: dict[str, Quantization] = {"bf16": "none", "fp8": "fp8-block", "fp8-online": "none"}
        named: Quantization = self.weights  # type: ignore[assignment]
        return formats.get(self.weights, named)

    @property
    def runs(self) -> tuple[str, str]:
        """The format of its experts and the MoE backend that they run on, as the log names them."""
        weights, _, backend = self.logged.partition(" experts with ")
        return weights, backend

    @property
    def name(self) -> str:
        """Such as "qwen3_moe-bf16-triton"."""
        return "-".join(filter(None, (self.family, self.weights, self.backend, self.drafts, self.variation)))


_FP8 = {"fp8_gemm_runner_backend": "triton"}  # of the linear layers: DeepGEMM would compile for minutes
ALL = (
    # Each family with the backend that every format has.
    Case("qwen3_moe", "bf16", "triton", "bf16 experts with triton"),
    Case("deepseek_v3", "fp8", "triton", "block-FP8 experts with triton", R1, options=_FP8, share_all=True),
    Case("glm4_moe", "bf16", "triton", "bf16 experts with triton"),
    Case(
        "gpt_oss",
        "mxfp4",
        "flashinfer_mxfp4",
        "MXFP4 experts with flashinfer_mxfp4",
        GPT_OSS,
        kernels="mxfp4",
        options=FIXED,
        environment=NO_ATOMICS,
        share_all=True,
    ),
    Case("qwen2_moe", "bf16", "triton", "bf16 experts with triton", {**BASE, "num_heads": 4}),
    Case("deepseek_v2", "bf16", "triton", "bf16 experts with triton", {**BASE, **LATENT}),
    Case("deepseek_v3", "bf16", "triton", "bf16 experts with triton", {**BASE, **LATENT}),
    Case("kimi_k2", "bf16", "triton", "bf16 experts with triton", K2),
    Case("minimax_m2", "bf16", "triton", "bf16 experts with triton", {**BASE, "qk_norm": 1}),
    Case("gpt_oss", "bf16", "triton", "bf16 experts with triton", GPT_OSS),
    Case(
        "llama4",
        "bf16",
        "triton",
        "bf16 experts with triton",
        {**BASE, "top_k": 1},
        options={"disable_hybrid_swa_memory": True},
    ),
    # The other backends.
    Case(
        "qwen3_moe",
        "bf16",
        "flashinfer_cutlass",
        "bf16 experts with flashinfer_cutlass",
        kernels="bf16",
        options=FIXED,
        environment=NO_ATOMICS,
    ),
    Case(
        "deepseek_v3",
        "fp8",
        "flashinfer_cutlass",
        "block-FP8 experts with dwdp_flashinfer_fp8",
        R1,
        kernels="fp8-block",
        options=FIXED | _FP8,
        environment=NO_ATOMICS,
    ),
    Case(
        "deepseek_v3",
        "fp8",
        "deep_gemm",
        "block-FP8 experts with deep_gemm",
        R1,
        options=_FP8,
        environment=COMPACT,
        share_all=True,
    ),
    Case("qwen3_moe", "fp8", "triton", "block-FP8 experts with triton", options=_FP8),
    Case(
        "qwen3_moe",
        "fp8",
        "flashinfer_cutlass",
        "block-FP8 experts with dwdp_flashinfer_fp8",
        kernels="fp8-block",
        options=FIXED | _FP8,
        environment=NO_ATOMICS,
    ),
    Case(
        "qwen3_moe",
        "fp8",
        "deep_gemm",
        "block-FP8 experts with deep_gemm",
        options=_FP8,
        environment=MASKED,
    ),
    Case("qwen3_moe", "bf16", "deep_gemm", "bf16 experts with deep_gemm", environment=MASKED),
    Case("gpt_oss", "mxfp4", "triton", "MXFP4 experts with triton", GPT_OSS),
    # The other formats. SGLang takes some of their backends only where nobody names one.
    Case("qwen3_moe", "fp8-online", "triton", "FP8 experts with triton", options={"quantization": "fp8"}),
    Case("qwen3_moe", "fp8-channel", "triton", "FP8 experts with triton"),
    Case("qwen3_moe", "fp8-tensor", "triton", "FP8 experts with triton", share_all=True),
    Case("qwen3_moe", "fp8-modelopt", "triton", "FP8 experts with triton"),
    Case("qwen3_moe", "int4", "auto", "int4/int8 experts with marlin", share_all=True),
    Case("kimi_k2", "int4", "auto", "int4/int8 experts with marlin", K2),
    Case("qwen3_moe", "gptq-int4", "auto", "int4/int8 experts with marlin", options=HALF),
    Case("qwen3_moe", "gptq-int8", "auto", "int4/int8 experts with marlin", options=HALF, share_all=True),
    Case("qwen3_moe", "awq", "auto", "int4/int8 experts with marlin", share_all=True),
    Case("qwen3_moe", "int4", "triton", "int4/int8 experts with triton"),
    Case("qwen3_moe", "nvfp4-modelopt", "auto", "NVFP4 experts with marlin", share_all=True),
    Case("qwen3_moe", "nvfp4", "auto", "NVFP4 experts with marlin"),
    Case("gpt_oss", "mxfp4", "marlin", "MXFP4 experts with marlin", GPT_OSS),
    Case("step3p5", "bf16", "triton", "bf16 experts with triton", options={"trust_remote_code": True}),
    Case(
        "granitemoehybrid",
        "bf16",
        "triton",
        "bf16 experts with triton",
        GRANITE_4,
        options=STATES,
        tuned=True,
    ),
    Case("nemotron_h", "bf16", "triton", "bf16 experts with triton", options=STATES, tuned=True),
    Case("qwen3_next", "bf16", "triton", "bf16 experts with triton", QWEN3_NEXT, options=STATES, tuned=True),
    Case(
        "qwen3_5_moe_text",
        "bf16",
        "triton",
        "bf16 experts with triton",
        QWEN3_NEXT,
        options=STATES,
        tuned=True,
    ),
    Case("deepseek_v32", "bf16", "triton", "bf16 experts with triton", SPARSE, options=DSA),
    Case("glm_moe_dsa", "bf16", "triton", "bf16 experts with triton", SPARSE, options=DSA),
    Case(
        "kimi_linear",
        "bf16",
        "triton",
        "bf16 experts with triton",
        {**BASE, **LATENT, "num_heads": 4},
        options=STATES,
        tuned=True,
    ),
)
_MXFP4 = next(case for case in ALL if case.backend == "flashinfer_mxfp4")
# Options of DWDP's, each on 2 ranks.
VARIATIONS = (
    replace(ALL[0], ranks=(2,), variation="audit", dwdp={"dwdp_audit": True}),
    replace(
        ALL[0],
        ranks=(2,),
        variation="staged",
        dwdp={"dwdp_view": "staged", "cuda_graph_backend_decode": "full"},  # no graph can read slots
    ),
    replace(_MXFP4, ranks=(2,), variation="auto", dwdp={"moe_runner_backend": "auto"}),
)
# Speculative decoding.
_DRAFT_LAYER = {**BASE, "draftable": 1, "draft_layers": 1}
_CHAIN = {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
_TREE = {"speculative_num_steps": 3, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}
_NEXTN = Case(
    "deepseek_v3",
    "bf16",
    "triton",
    "bf16 experts with triton",
    {**_DRAFT_LAYER, **LATENT},
    options={"speculative_algorithm": "NEXTN", **_CHAIN},
    drafts="nextn",
)
_EAGLE = Case(
    "qwen3_moe",
    "bf16",
    "triton",
    "bf16 experts with triton",
    {**BASE, "draftable": 1},
    options={"speculative_algorithm": "EAGLE", **_TREE},
    drafts="eagle",
    head="eagle",
)
DRAFTS = (
    _NEXTN,
    replace(
        _NEXTN,
        ranks=(2,),
        options={**_NEXTN.options, "cuda_graph_backend_prefill": "breakable"},
        drafts="nextn_prefill_graphs",
    ),
    replace(_NEXTN, family="glm4_moe", shape=_DRAFT_LAYER, drafts="nextn"),
    _EAGLE,
    replace(_EAGLE, options={"speculative_algorithm": "EAGLE3", **_CHAIN}, drafts="eagle3", head="eagle3"),
)
BY_NAME = {case.name: case for case in ALL + VARIATIONS + DRAFTS}
# Models whose shared experts SGLang fuses into the routed ones by itself, which DWDP turns off. With each, two models
# that differ in their MoE kernels alone, and so in how sums are rounded.
FUSED = {
    "glm4_moe-bf16-triton": ("qwen3_moe-bf16-triton", "qwen3_moe-bf16-deep_gemm"),
    "deepseek_v3-fp8-triton": ("deepseek_v3-fp8-triton", "deepseek_v3-fp8-deep_gemm"),
}

# What all engines have in common.
CHUNK = 1024
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "attention_backend": "triton",
    "disable_custom_all_reduce": True,
    "cuda_graph_max_bs_decode": 4,
    "chunked_prefill_size": CHUNK,
    "max_prefill_tokens": CHUNK,
    "max_total_tokens": 8192,
    "max_running_requests": 12,  # divided by the ranks
    "mem_fraction_static": 0.9,  # of what the other engines leave; the number of tokens is what limits the cache
    "log_level": "info",
}
LENGTHS = (1, 5, 17, 63, 64, 65, 130, 257, 513, 900, 1025, 1500)
NEW_TOKENS = 12


def prompts() -> list[list[int]]:
    """Prompts on both sides of the limit of direct views and of a chunk.

    Every third goes on where an earlier one ended, so that it finds a prefix in the radix cache.
    """
    draw = random.Random(0)
    result: list[list[int]] = []
    for index, length in enumerate(LENGTHS):
        known = result[index - 2] if index % 3 == 2 else []
        result.append([*known, *(draw.randrange(10, 2000) for _ in range(length - len(known)))])
    return result
