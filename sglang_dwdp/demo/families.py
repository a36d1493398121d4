"""The model families of the random checkpoints: their sizes, their config.json, their tensors.

Pure Python. The fields and names are those of the released models on Hugging Face.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sglang_dwdp.demo import more_families as more

Family = Literal[
    "qwen3_moe",
    "qwen2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "mixtral",
    "glm4_moe",
    "kimi_k2",
    "gpt_oss",
    "minimax_m2",
    "llama4",
]
TensorSpec = tuple[str, tuple[int, ...], float]  # name, size, gain
_ARCHITECTURES: dict[str, str] = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    **more.ARCHITECTURES,
}
_LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
_LIKE_V3 = ("deepseek_v3", "kimi_k2")


@dataclass(frozen=True)
class Shape:
    """The sizes of a checkpoint; every field can be given to `make_checkpoint`.

    By default an expert's bytes are no whole number of 4 KiB pages, neither in bfloat16 nor in
    float32, so that neighbouring ranks share pages; its rows are multiples of 16 bytes, as grouped
    matrix products want.
    """

    num_experts: int = 8
    num_layers: int = 4
    hidden_size: int = 96
    moe_intermediate_size: int = 88
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    top_k: int = 2
    first_k_dense_replace: int = 1  # DeepSeek only: how many leading layers have no experts
    kv_lora_rank: int = 64
    q_lora_rank: int = 48  # DeepSeek-V3 only
    rope_head_dim: int = 16
    max_positions: int = 4096
    qk_norm: int = 0  # 1: with it; MiniMax only: SGLang has this model's norm for CUDA and AMX

    def expert_groups(self) -> int:
        """Groups for DeepSeek-V3's grouped top-k: 8 as released for many experts, else at least two experts in
        each, 1 if nothing fits."""
        choices = ((8, 64), (4, 8), (3, 6), (2, 4))
        return next((n for n, least in choices if self.num_experts % n == 0 and self.num_experts >= least), 1)


def config(family: Family, s: Shape, dtype: str, vocab_size: int) -> dict[str, Any]:
    """What config.json says. `dtype` is a name such as "bfloat16"."""
    result: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": s.hidden_size,
        "intermediate_size": 2 * s.hidden_size,
        "moe_intermediate_size": s.moe_intermediate_size,
        "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_kv_heads,
        "num_experts_per_tok": s.top_k,
        "hidden_act": "silu",
        "max_position_embeddings": s.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "pad_token_id": 2,
    }
    if family == "qwen3_moe":
        # No dense layers: SGLang's CPU engine gives wrong tokens with mlp_only_layers.
        result |= {"head_dim": s.head_dim, "norm_topk_prob": True}
    if family == "qwen2_moe":
        result |= {
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": s.hidden_size,
            "qkv_bias": True,
        }
    if family in ("qwen3_moe", "qwen2_moe"):
        result |= {"num_experts": s.num_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}
        return result

    if family == "llama4":
        text = result | more.config(family, s)
        outer = ("architectures", "torch_dtype", "tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id")
        return {"model_type": family, "text_config": text, **{name: text[name] for name in outer}}
    if family not in _LATENT:
        return result | more.config(family, s)

    # Kimi K2 is DeepSeek-V3 without groups of experts, and routes to more of them.
    groups = s.expert_groups() if family == "deepseek_v3" else 1
    return result | {
        "num_key_value_heads": s.num_heads,
        "n_routed_experts": s.num_experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": s.first_k_dense_replace,
        "moe_layer_freq": 1,
        "kv_lora_rank": s.kv_lora_rank,
        "q_lora_rank": s.q_lora_rank if family in _LIKE_V3 else None,
        "qk_nope_head_dim": s.head_dim,
        "qk_rope_head_dim": s.rope_head_dim,
        "v_head_dim": s.head_dim,
        "n_group": groups,
        "topk_group": (groups + 1) // 2,
        "topk_method": "noaux_tc" if family in _LIKE_V3 else "greedy",
        "scoring_func": "sigmoid" if family in _LIKE_V3 else "softmax",
        "norm_topk_prob": family in _LIKE_V3,
        "routed_scaling_factor": 2.5 if family in _LIKE_V3 else 1.0,
        "num_nextn_predict_layers": 0,
        # As in every released DeepSeek model; the CPU engine knows no other rotary embedding for it.
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }


def tensors(family: Family, s: Shape, vocab_size: int) -> Iterator[TensorSpec]:
    """Every tensor of a checkpoint.

    A gain scales the random values: about 1 keeps what a layer puts out as large as what it reads.
    Attention and experts get more, so that they weigh as much as the token's own embedding, and the
    router gets more, so that its choices are clear.
    """
    yield "model.embed_tokens.weight", (vocab_size, s.hidden_size), 1.0
    for i in range(s.num_layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (s.hidden_size,), 1.0
        yield layer + "post_attention_layernorm.weight", (s.hidden_size,), 1.0
        if family in more.ARCHITECTURES and family not in _LATENT:
            yield from more.attention(layer + "self_attn.", family, s)
            yield from more.ffn(layer, family, s, i)
            continue
        attention = _latent_attention if family in _LATENT else _attention
        yield from attention(layer + "self_attn.", family, s)
        yield from _ffn(layer + "mlp.", family, s, i)
    yield "model.norm.weight", (s.hidden_size,), 1.0
    yield "lm_head.weight", (vocab_size, s.hidden_size), 4.0


def _attention(prefix: str, family: Family, s: Shape) -> Iterator[TensorSpec]:
    # Qwen2-MoE has no field for the head size: it is always hidden_size / heads.
    head = s.head_dim if family == "qwen3_moe" else s.hidden_size // s.num_heads
    for name, heads in (("q", s.num_heads), ("k", s.num_kv_heads), ("v", s.num_kv_heads)):
        yield f"{prefix}{name}_proj.weight", (heads * head, s.hidden_size), 1.5
        if family == "qwen2_moe":
            yield f"{prefix}{name}_proj.bias", (heads * head,), 0.2
    if family == "qwen3_moe":
        yield prefix + "q_norm.weight", (head,), 1.5
        yield prefix + "k_norm.weight", (head,), 1.5
    yield prefix + "o_proj.weight", (s.hidden_size, s.num_heads * head), 2.0


def _latent_attention(prefix: str, family: Family, s: Shape) -> Iterator[TensorSpec]:
    query = s.num_heads * (s.head_dim + s.rope_head_dim)
    if family in _LIKE_V3:
        yield prefix + "q_a_proj.weight", (s.q_lora_rank, s.hidden_size), 1.0
        yield prefix + "q_a_layernorm.weight", (s.q_lora_rank,), 1.0
        yield prefix + "q_b_proj.weight", (query, s.q_lora_rank), 1.5
    else:
        yield prefix + "q_proj.weight", (query, s.hidden_size), 1.5
    yield prefix + "kv_a_proj_with_mqa.weight", (s.kv_lora_rank + s.rope_head_dim, s.hidden_size), 1.5
    yield prefix + "kv_a_layernorm.weight", (s.kv_lora_rank,), 1.0
    yield prefix + "kv_b_proj.weight", (2 * s.num_heads * s.head_dim, s.kv_lora_rank), 1.5
    yield prefix + "o_proj.weight", (s.hidden_size, s.num_heads * s.head_dim), 2.0


def _ffn(prefix: str, family: Family, s: Shape, layer: int) -> Iterator[TensorSpec]:
    if family in _LATENT and layer < s.first_k_dense_replace:
        yield from _mlp(prefix, s.hidden_size, 2 * s.hidden_size)
        return
    yield prefix + "gate.weight", (s.num_experts, s.hidden_size), 2.0
    if family in _LIKE_V3:
        yield prefix + "gate.e_score_correction_bias", (s.num_experts,), 0.2
    for e in range(s.num_experts):
        yield from _mlp(f"{prefix}experts.{e}.", s.hidden_size, s.moe_intermediate_size)
    if family == "qwen2_moe":
        yield from _mlp(prefix + "shared_expert.", s.hidden_size, s.hidden_size)
        yield prefix + "shared_expert_gate.weight", (1, s.hidden_size), 1.0
    if family in _LATENT:
        yield from _mlp(prefix + "shared_experts.", s.hidden_size, s.moe_intermediate_size)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    yield prefix + "gate_proj.weight", (intermediate, hidden), 1.5
    yield prefix + "up_proj.weight", (intermediate, hidden), 1.5
    yield prefix + "down_proj.weight", (hidden, intermediate), 2.0
