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

# Every architecture of SGLang's with routed experts is in exactly one of VALIDATED, VALIDATED_ON_CPU, UNVALIDATED and
# UNSUPPORTED. docs/support.md has the tests of the first two, and what they were run on.
VALIDATED = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",  # DeepSeek-V3 and R1, Kimi K2
        "Glm4MoeForCausalLM",
        "GlmMoeDsaForCausalLM",
        "GptOssForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "KimiLinearForCausalLM",
        "Llama4ForConditionalGeneration",
        "MiniMaxM2ForCausalLM",
        "NemotronHForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "Step3p5ForCausalLM",
    }
)
VALIDATED_ON_CPU = frozenset(
    {
        "BailingMoeV2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "ExaoneMoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "Glm4vMoeForConditionalGeneration",  # with images
        "GraniteMoeForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "HYV3ForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "LagunaForCausalLM",
        "Lfm2MoeForCausalLM",
        "LongcatFlashForCausalLM",
        "MellumForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",  # with images
        "SarvamMoEForCausalLM",
    }
)
# By reading: each rank runs its requests alone, and experts are in FusedMoE layers that SGLang's code runs.
UNVALIDATED = frozenset(
    {
        "BailingMM2NativeForConditionalGeneration",
        "BailingMMNativeForConditionalGeneration",
        "BailingMoEForCausalLM",
        "BailingMoeForCausalLM",
        "BailingMoeV2_5ForCausalLM",
        "BailingMoeV3ForCausalLM",
        "BailingMoeV3VLForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "DeepseekOCRForCausalLM",
        "DeepseekVL2ForCausalLM",
        "Dots3NoteForCausalLM",
        "DotsVLMForCausalLM",
        "ExaoneMoEForCausalLM",
        "GigaChat35ForCausalLM",
        "Glm5NextForConditionalGeneration",
        "HYV4ForCausalLM",
        "IQuestQ1ForCausalLM",
        "InternS1ForConditionalGeneration",
        "InternS1ProForConditionalGeneration",
        "InternS2MobiusForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "InternVLChatModel",
        "K2HorizonForCausalLM",
        "KimiK25ForConditionalGeneration",
        "KimiVLForConditionalGeneration",
        "MiMoV2ForCausalLM",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "MiniMaxM3SparseForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
        "MistralLarge3ForCausalLM",
        "NemotronHPuzzleForCausalLM",
        "NemotronH_Nano_Omni_Reasoning_V3",
        "NemotronH_Nano_VL_V2",
        "NemotronH_Omni_Reasoning_V3",
        "PixtralForConditionalGeneration",
        "Qwen3OmniMoeForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForConditionalGeneration",
        "SarvamMLAForCausalLM",
        "Step3VLForConditionalGeneration",
        "Step3p7ForConditionalGeneration",
        "UnlimitedOCRForCausalLM",
        "XllmForCausalLM",
    }
)
# For which SGLang has no attention data parallelism: it would shard them over all ranks. Ranks construct them as if
# each were alone (`srt_patches/linear.py`).
WITHOUT_DP_ATTENTION = frozenset(
    {
        "Cohere2MoeForCausalLM",
        "Cohere2VisionForConditionalGeneration",
        "Ernie4_5_MoeForCausalLM",
        "GigaChat35ForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "HYV3ForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "IQuestQ1ForCausalLM",
        "KimiLinearForCausalLM",
        "Lfm2MoeForCausalLM",
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
        "PhiMoEForCausalLM",
    }
)
_SUMS = (
    "SGLang's code for it sums over all ranks in every layer, even if each rank runs all experts, so a rank's forward "
    "would wait for the others, or mix their requests into its own"
)
_GATHERS = (
    "SGLang's code for it gathers token ids and hidden states of all ranks in a forward, so a rank's forward would "
    "wait for the others, or take in their requests"
)
_OWN_EXPERTS = "SGLang's code for it runs experts without a FusedMoE layer, whose tensors are what DWDP shares"
_SPLIT_HEADS = "SGLang divides its attention heads among all ranks, so a rank would compute a part of each token"
_SAME_NUMBER = "its layers have two sets of experts under one number, by which DWDP tells layers apart"
_STATE = "SGLang divides the state of its attention by all ranks, while each rank has all heads"
_DENSE_SPLIT = "SGLang's code for it rejects dense layers that each rank runs alone"
_NO_LOADER = (
    "SGLang's code for it loads no experts from a checkpoint; it serves Llama 4 without images as "
    "Llama4ForConditionalGeneration"
)
_DENOISED = (
    "SGLang runs as many forwards a step as a rank's masked tokens need, for which it has no attention data parallelism"
)
_GENERIC = "SGLang's generic code for models of transformers shards every layer over all ranks"
UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "Gemma4ForCausalLM",
            "Gemma4ForConditionalGeneration",
            "Grok1ForCausalLM",
            "Grok1ModelForCausalLM",
            "InklingForConditionalGeneration",
            "KimiK3ForConditionalGeneration",
            "KimiK3LinearForCausalLM",
            "MuseSparkForConditionalGeneration",
        ),
        _SUMS,
    ),
    "DeepseekV4ForCausalLM": _GATHERS,
    **dict.fromkeys(
        (
            "AfmoeForCausalLM",
            "DbrxForCausalLM",
            "DeepseekForCausalLM",  # DeepSeek-MoE, before V2
            "QuantMixtralForCausalLM",
            "XverseMoeForCausalLM",
        ),
        _OWN_EXPERTS,
    ),
    "DiffusionGemmaForBlockDiffusion": _SPLIT_HEADS,
    "Ernie4_5_VLMoeForConditionalGeneration": _SAME_NUMBER,
    "ZayaForCausalLM": _STATE,
    "BeamForCausalLM": _DENSE_SPLIT,
    "Llama4ForCausalLM": _NO_LOADER,
    **dict.fromkeys(("LLaDA2MoeModelLM", "SDARMoeForCausalLM"), _DENOISED),
    **dict.fromkeys(
        (
            f"Transformers{modal}{moe}{task}"
            for modal in ("", "MultiModal")
            for moe in ("", "MoE")
            for task in ("ForCausalLM", "EmbeddingModel", "ForSequenceClassification")
        ),
        _GENERIC,
    ),
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
    numbers = (max(value, default=0) if isinstance(value, list) else value for value in values)  # one for each layer
    return next((number for number in numbers if isinstance(number, int) and number >= least), None)


def check(architectures: Iterable[str] | None) -> str | None:
    """Check that DWDP supports a model.

    Args:
        architectures: of its config.json.

    Returns:
        A warning for a model that was not validated on GPUs; None if there is nothing to say.

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
    known = ""
    if VALIDATED_ON_CPU.intersection(names):
        known = " on GPUs, only on the CPU engine"
    elif not UNVALIDATED.intersection(names):
        known = ", and is not among the models that DWDP knows"
    return (
        f"{', '.join(names)} has not been validated against a single rank{known} (docs/models.md). Compare some "
        "answers with a server without --enable-dwdp first."
    )
