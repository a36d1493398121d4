"""Which of SGLang's models are validated with DWDP, and which are unsupported. Pure.

By the names in a checkpoint's config.json (`architectures`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sglang_dwdp.errors import DwdpConfigError

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
_SUMS = (
    "SGLang's code for it sums routed and shared experts over all ranks in every MoE layer, also where each rank runs "
    "all experts, so a rank's forward would wait for the others, or take in their requests"
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


def check(architectures: Iterable[str] | None) -> str | None:
    """Check that a model is supported.

    Args:
        architectures: The names in the checkpoint's config.json.

    Returns:
        A warning for a model that was not validated against a single rank; None where there is nothing to say.

    Raises:
        DwdpConfigError: The model is unsupported.
    """
    names = list(architectures or ())
    for name in names:
        if name in UNSUPPORTED:
            raise DwdpConfigError(
                f"--enable-dwdp cannot be used here: {name}: {UNSUPPORTED[name]}. Serve it without --enable-dwdp."
            )
    if not names or VALIDATED.intersection(names):
        return None
    return (
        f"{', '.join(names)} has not been validated against a single rank (docs/support.md). Compare some answers "
        "with a server without --enable-dwdp first."
    )
