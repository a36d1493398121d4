"""Further model families, as `families.py` describes the first ones: what differs in config.json, and the tensors.

Kept apart because only the tests behind the marker `models` serve them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_dwdp.demo.families import Shape, TensorSpec

ARCHITECTURES: dict[str, str] = {
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",  # a checkpoint without its vision part is served as text only
}
Tensors = Callable[["Shape", int, str], "Iterator[TensorSpec]"]


def config(family: str, s: Shape) -> dict[str, Any]:
    """The fields that are not common to all families, or have another value."""
    if family == "mixtral":
        return {"num_local_experts": s.num_experts, "intermediate_size": s.moe_intermediate_size, "head_dim": None}
    if family == "glm4_moe":
        return {
            "head_dim": s.head_dim,
            "attention_bias": True,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "n_routed_experts": s.num_experts,
            "n_shared_experts": 1,
            "first_k_dense_replace": s.first_k_dense_replace,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "num_nextn_predict_layers": 0,
        }
    if family == "gpt_oss":
        return {
            "head_dim": s.head_dim,
            "attention_bias": True,
            "num_local_experts": s.num_experts,
            "experts_per_token": s.top_k,
            "intermediate_size": s.moe_intermediate_size,
            "swiglu_limit": 2.0,  # low enough that it clamps something
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * (s.num_layers // 2),
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        }
    if family == "llama4":
        return {
            "model_type": "llama4_text",
            "head_dim": s.head_dim,
            "num_local_experts": s.num_experts,
            "intermediate_size": s.moe_intermediate_size,
            "intermediate_size_mlp": 2 * s.hidden_size,
            "interleave_moe_layer_step": 1,
            "use_qk_norm": True,
            "attention_chunk_size": 8192,
            "attn_temperature_tuning": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        }
    assert family == "minimax_m2"
    return {
        "head_dim": s.head_dim,
        "rotary_dim": s.head_dim // 2,
        "num_local_experts": s.num_experts,
        "intermediate_size": s.moe_intermediate_size,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": bool(s.qk_norm),
        "num_mtp_modules": 0,
        "use_mtp": False,
    }


def attention(prefix: str, family: str, s: Shape) -> Iterator[TensorSpec]:
    """Attention of one layer."""
    head = s.hidden_size // s.num_heads if family == "mixtral" else s.head_dim
    biased = family in ("glm4_moe", "gpt_oss")
    for name, heads in (("q", s.num_heads), ("k", s.num_kv_heads), ("v", s.num_kv_heads)):
        yield f"{prefix}{name}_proj.weight", (heads * head, s.hidden_size), 1.5
        if biased:
            yield f"{prefix}{name}_proj.bias", (heads * head,), 0.2
    yield prefix + "o_proj.weight", (s.hidden_size, s.num_heads * head), 2.0
    if family == "gpt_oss":
        yield prefix + "o_proj.bias", (s.hidden_size,), 0.2
        yield prefix + "sinks", (s.num_heads,), 1.0
    if family == "glm4_moe":
        yield prefix + "q_norm.weight", (head,), 1.5
        yield prefix + "k_norm.weight", (head,), 1.5
    if family == "minimax_m2" and s.qk_norm:  # over all heads together
        yield prefix + "q_norm.weight", (s.num_heads * head,), 1.5
        yield prefix + "k_norm.weight", (s.num_kv_heads * head,), 1.5


def ffn(layer: str, family: str, s: Shape, index: int) -> Iterator[TensorSpec]:
    """The experts of one layer and what belongs to them; `layer` is the layer's prefix."""
    if family == "gpt_oss":
        yield from _gpt_oss(layer + "mlp.", s)
    elif family == "glm4_moe":
        yield from _glm(layer + "mlp.", s, index)
    elif family == "llama4":
        yield from _llama4(layer + "feed_forward.", s)
    else:
        block = layer + "block_sparse_moe."
        yield block + "gate.weight", (s.num_experts, s.hidden_size), 2.0
        if family == "minimax_m2":
            yield block + "e_score_correction_bias", (s.num_experts,), 0.2
        for e in range(s.num_experts):
            yield from _expert(f"{block}experts.{e}.", ("w1", "w3", "w2"), s)


def _glm(prefix: str, s: Shape, index: int) -> Iterator[TensorSpec]:
    names = ("gate_proj", "up_proj", "down_proj")
    if index < s.first_k_dense_replace:
        yield from _expert(prefix, names, s, 2 * s.hidden_size)
        return
    yield prefix + "gate.weight", (s.num_experts, s.hidden_size), 2.0
    yield prefix + "gate.e_score_correction_bias", (s.num_experts,), 0.2
    for e in range(s.num_experts):
        yield from _expert(f"{prefix}experts.{e}.", names, s)
    yield from _expert(prefix + "shared_experts.", names, s)


def _expert(prefix: str, names: tuple[str, str, str], s: Shape, width: int | None = None) -> Iterator[TensorSpec]:
    width = width or s.moe_intermediate_size
    gate, up, down = names
    yield f"{prefix}{gate}.weight", (width, s.hidden_size), 1.5
    yield f"{prefix}{up}.weight", (width, s.hidden_size), 1.5
    yield f"{prefix}{down}.weight", (s.hidden_size, width), 2.5


def _gpt_oss(prefix: str, s: Shape) -> Iterator[TensorSpec]:
    """All experts in one tensor, inputs first, gate and up in alternating columns."""
    yield prefix + "router.weight", (s.num_experts, s.hidden_size), 2.0
    yield prefix + "router.bias", (s.num_experts,), 0.2
    experts = prefix + "experts."
    yield experts + "gate_up_proj", (s.num_experts, s.hidden_size, 2 * s.moe_intermediate_size), 1.5
    yield experts + "gate_up_proj_bias", (s.num_experts, 2 * s.moe_intermediate_size), 0.2
    yield experts + "down_proj", (s.num_experts, s.moe_intermediate_size, s.hidden_size), 2.5
    yield experts + "down_proj_bias", (s.num_experts, s.hidden_size), 0.2


def _llama4(prefix: str, s: Shape) -> Iterator[TensorSpec]:
    """All experts in one tensor, inputs first, gate and up in halves; a shared expert of the same size."""
    yield prefix + "router.weight", (s.num_experts, s.hidden_size), 2.0
    yield prefix + "experts.gate_up_proj", (s.num_experts, s.hidden_size, 2 * s.moe_intermediate_size), 1.5
    yield prefix + "experts.down_proj", (s.num_experts, s.moe_intermediate_size, s.hidden_size), 2.5
    yield from _expert(prefix + "shared_expert.", ("gate_proj", "up_proj", "down_proj"), s)
