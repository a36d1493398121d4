"""Which of SGLang's models DWDP was compared with, and which it cannot serve. Pure.

By the names in a checkpoint's config.json (`architectures`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sglang_dwdp.errors import DwdpConfigError

# A config says how many routed experts a layer has under one of these names.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")

# docs/support.md has the tests, and what they were run on.
COMPARED = frozenset(
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
REFUSED: Mapping[str, str] = {"KimiK3ForConditionalGeneration": _SUMS, "KimiK3LinearForCausalLM": _SUMS}


def check(architectures: Iterable[str] | None) -> str | None:
    """A warning for a model that was not compared with a single rank; None: there is nothing to say.

    Raises:
        DwdpConfigError: the model cannot be served with DWDP.
    """
    names = list(architectures or ())
    for name in names:
        if name in REFUSED:
            raise DwdpConfigError(
                f"--enable-dwdp cannot be used here: {name}: {REFUSED[name]}. Serve it without --enable-dwdp."
            )
    if not names or COMPARED.intersection(names):
        return None
    return (
        f"{', '.join(names)} has not been compared with a single rank (docs/support.md). Compare some answers with a "
        "server without --enable-dwdp first; --dwdp-audit counts collectives of forwards, of which there must be none."
    )
