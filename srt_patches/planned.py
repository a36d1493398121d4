"""Settles `--dwdp-direct-max-tokens` once, in the launcher, so that all ranks have the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import model_config_of

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.experts.direct_limit import DirectLimit, plan_direct_limit

_WHY = "_dwdp_direct_limit"  # travels to the ranks with the server arguments


def with_direct_limit(server_args: Any, view: Any, config: DwdpConfig, group_size: int) -> DwdpConfig:
    """`config` with the limit settled; a limit of the user's stays.

    What --dwdp-memory-gib allows is not known before the weights are loaded, so it is planned with a rank's shard.

    view: the server arguments as far as they are resolved, the device among them.
    """
    if config.direct_max_tokens is not None:
        limit = DirectLimit(config.direct_max_tokens, "as given")
    else:
        limit = plan_direct_limit(
            model_config_of(server_args).hf_config.to_dict(),
            str(view.model_path),
            _device_name(view),
            group_size,
            quantization=view.quantization,
            local_experts=config.local_experts or 0,
            depth=config.depth,
        )
    setattr(server_args, _WHY, limit.why)
    return dataclasses.replace(config, direct_max_tokens=limit.tokens)


def _device_name(view: Any) -> str | None:
    if view.device != "cuda" or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(view.base_gpu_id))


def why_direct_limit(server_args: Any) -> str:
    """What the limit of these resolved arguments rests on."""
    return str(getattr(server_args, _WHY, "as given"))
