"""Shapes of well-known MoE models: the fields of their published ``config.json`` that matter here.

Source: the ``config.json`` of each checkpoint on the Hugging Face hub.
"""

from __future__ import annotations

from typing import Any

_DEEPSEEK_MLA: dict[str, Any] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "n_shared_experts": 1,
    "quantization_config": {"quant_method": "fp8"},
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}
_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "sliding_window": 128,
    "quantization_config": {"quant_method": "mxfp4"},
}

BUILTIN_CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        **_DEEPSEEK_MLA,
        "model_type": "deepseek_v3",
        "n_routed_experts": 256,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "vocab_size": 129280,
    },
    "kimi-k2": {
        **_DEEPSEEK_MLA,
        "model_type": "kimi_k2",
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "num_attention_heads": 64,
        "vocab_size": 163840,
    },
    "qwen3-30b-a3b": {
        **_QWEN3,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
    },
    "qwen3-235b-a22b": {
        **_QWEN3,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "moe_intermediate_size": 1536,
        "intermediate_size": 12288,
        "num_attention_heads": 64,
    },
    "gpt-oss-20b": {
        **_GPT_OSS,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "gpt-oss-120b": {
        **_GPT_OSS,
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    },
    "glm-4.5": {
        "model_type": "glm4_moe",
        "hidden_size": 5120,
        "num_hidden_layers": 92,
        "first_k_dense_replace": 3,
        "n_routed_experts": 160,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "intermediate_size": 12288,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151552,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "mixtral-8x22b": {
        "model_type": "mixtral",
        "hidden_size": 6144,
        "num_hidden_layers": 56,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 16384,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
}

ALIASES: dict[str, str] = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-r1-0528": "deepseek-v3",
    "qwen3-235b": "qwen3-235b-a22b",
    "qwen3-30b": "qwen3-30b-a3b",
    "mixtral": "mixtral-8x7b",
    "kimi-k2-instruct": "kimi-k2",
}
