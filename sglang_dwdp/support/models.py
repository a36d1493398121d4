"""Which of SGLang's models were validated with DWDP, which are unsupported, and what their configs say. Pure.

Models go by the names in a checkpoint's config.json (`architectures`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sglang_dwdp.errors import DwdpConfigError

# Keys of a model's config, the more usual first.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
EXPERTS_PER_TOKEN_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
# What a model of other values has other tensors for, or reads its tensors differently by.
SIZE_KEYS = (
    *EXPERT_COUNT_KEYS,
    *EXPERTS_PER_TOKEN_KEYS,
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

# docs/support.md has the tests, and what they were run on.
VALIDATED = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",  # DeepSeek-V3 and R1, Kimi K2
        "Glm4MoeForCausalLM",
        "GptOssForCausalLM",
        "Llama4ForConditionalGeneration",
        "MiniMaxM2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
# For which SGLang has no attention data parallelism: it would shard them over all ranks. Ranks construct them as if
# each were alone (`srt_patches/linear.py`).
WITHOUT_DP_ATTENTION = frozenset(
    {
        "Ernie4_5_MoeForCausalLM",
        "GraniteMoeForCausalLM",
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
    }
)
_SUMS = (
    "SGLang's code for it sums routed and shared experts over all ranks in every MoE layer, even if each rank runs all "
    "experts, so a rank's forward would wait for the others, or mix their requests into its own"
)
_GATHERS = (
    "SGLang's code for it gathers token ids and hidden states of all ranks in a forward, so a rank's forward would "
    "wait for the others, or take in their requests"
)
UNSUPPORTED: Mapping[str, str] = {
    "DeepseekV4ForCausalLM": _GATHERS,
    "KimiK3ForConditionalGeneration": _SUMS,
    "KimiK3LinearForCausalLM": _SUMS,
}


def expert_count(text_config: Any) -> int | None:
    """Routed experts of a layer, by a model's (text) config; None for a dense model."""
    return _first_number(text_config, EXPERT_COUNT_KEYS, least=2)


def experts_per_token(text_config: Any) -> int | None:
    """Experts that a token chooses, by a model's (text) config; None if it does not say."""
    return _first_number(text_config, EXPERTS_PER_TOKEN_KEYS, least=1)


def changed_sizes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The sizes that two checkpoints' config.json do not have in common, with both values.

    Args:
        old: of the one that is served.
        new: of the one that is to take its place; empty where it has none, which changes nothing.
    """
    before, after = ({**config, **config.get("text_config", {})} for config in (old, new))
    common = [key for key in SIZE_KEYS if key in before and key in after]
    return [f"{key} {before[key]} and {after[key]}" for key in common if before[key] != after[key]]


def _first_number(config: Any, keys: Sequence[str], least: int) -> int | None:
    values = (getattr(config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int) and value >= least), None)


def check(architectures: Iterable[str] | None) -> str | None:
    """Check that DWDP supports a model.

    Args:
        architectures: of its config.json.

    Returns:
        A warning for a model that was not validated; None if there is nothing to say.

    Raises:
        DwdpConfigError: the model is unsupported.
    """
    names = list(architectures or ())
    for name in names:
        if name in UNSUPPORTED:
            raise DwdpConfigError(
                f"--enable-dwdp cannot be used here: {name} is unsupported: {UNSUPPORTED[name]}. "
                "Serve it without --enable-dwdp."
            )
    if not names or VALIDATED.intersection(names):
        return None
    return (
        f"{', '.join(names)} has not been validated against a single rank (docs/support.md). Compare some answers with "
        "a server without --enable-dwdp first."
    )
