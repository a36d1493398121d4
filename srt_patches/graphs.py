"""CUDA graphs: a DWDP rank's forward is its own, so its graph is chosen by its own batch."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.hooks import Hook


def gathers_nothing(**_kwargs: Any) -> bool:
    """In place of `require_mlp_tp_gather`: MoE layers take this rank's tokens only.

    SGLang would size decode graphs by the largest batch of all ranks, a number that DWDP's schedulers do not
    gather.
    """
    return False


HOOKS = (Hook("sglang.srt.utils.common.require_mlp_tp_gather", HookType.REPLACE, gathers_nothing),)
