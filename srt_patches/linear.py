"""Linear layers: a DWDP rank runs its requests alone, so each of its layers is whole.

SGLang takes care of attention, of dense layers and of the LM head by the server's arguments, but shards some
layers over the tensor-parallel group all the same: the shared experts of DeepSeek and Qwen2-MoE, for instance,
whose partial sums nobody would add up (wrong tokens and no error with SGLang's own --dwdp-size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.hooks import Hook


def whole(original: Callable[[Any], Any], parallel_group: Any) -> Any:
    """Around `_resolve_linear_group`: no group to shard over, except attention's, which has one rank."""
    return original(parallel_group) if parallel_group == "attn_tp" else None


HOOKS = (Hook("sglang.srt.layers.linear._resolve_linear_group", HookType.AROUND, whole),)
