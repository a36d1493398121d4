"""Up to which size `--dwdp-view auto` reads experts in place, where the user did not say.

The planner's cost model decides: below that many tokens it is quicker to read the chosen experts over the link than
to copy all of them. Pure: the caller looks up the device and the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dwdp.config import UNPLANNED_DIRECT_MAX_TOKENS


@dataclass(frozen=True, slots=True)
class DirectLimit:
    """The largest forward, in tokens, that reads experts in place, and what it rests on."""

    tokens: int
    why: str


def plan_direct_limit(
    model_config: Mapping[str, Any],
    model_name: str,
    device_name: str | None,
    group_size: int,
    *,
    quantization: str | None = None,
    local_experts: int = 0,
    depth: int = 2,
) -> DirectLimit:
    """The planner's limit, or the constant where it cannot say. Never raises for what a model's config holds.

    Args:
        model_config: `config.json` of the model.
        model_name: for messages.
        device_name: as the driver gives it; None without a GPU.
        group_size: ranks that share one set of experts.
        quantization: SGLang's `--quantization`; None for what the checkpoint says.
        local_experts: experts of a layer that a rank keeps; 0 for its shard.
        depth: slots.
    """
    if device_name is None:
        return _unplanned("the planner knows GPUs only")
    # Imported here: a server without DWDP, or with a limit of the user's, has no use for the planner.
    from sglang_dwdp.planner.direct import direct_max_tokens
    from sglang_dwdp.planner.errors import PlannerError
    from sglang_dwdp.planner.gpus import gpu_of_device
    from sglang_dwdp.planner.models import format_of_quantization, model_from_config

    gpu = gpu_of_device(device_name)
    if gpu is None:
        return _unplanned(f"the planner does not know the GPU {device_name!r}")
    try:
        model = model_from_config(model_config, model_name)
        weight_format = format_of_quantization(quantization) if quantization else model.expert_format
        tokens = direct_max_tokens(
            model, gpu, group_size, weight_format=weight_format, local_experts=local_experts, depth=depth
        )
    except PlannerError as error:
        return _unplanned(f"the planner cannot say: {error}")
    kept = local_experts or -(-model.experts // group_size)
    why = f"planned for {kept} of {model.experts} {weight_format} experts on each of {group_size} {gpu.name}"
    return DirectLimit(tokens, why)


def _unplanned(why: str) -> DirectLimit:
    return DirectLimit(UNPLANNED_DIRECT_MAX_TOKENS, f"a constant, since {why}")
