"""Linear layers: a DWDP rank runs its requests alone, so none of its layers is sharded.

SGLang takes care of attention, of dense layers and of the LM head by the server's arguments, but shards some
layers over the tensor-parallel group nevertheless: the shared experts of DeepSeek and Qwen2-MoE, for instance,
whose partial sums nobody would add up (wrong tokens and no error with SGLang's own --dwdp-size), and the LM head of
MiniMax-M2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.hooks import Hook


def unsharded_group(original: Callable[[Any], Any], parallel_group: Any) -> Any:
    """Around `_resolve_linear_group`: no group to shard over, except attention's, which has one rank."""
    return original(parallel_group) if parallel_group == "attn_tp" else None


def unsharded_head(original: Callable[..., None], head: Any, *args: Any, **kwargs: Any) -> None:
    """Around `ParallelLMHead.__init__`: sharded over attention's group at most, which has one rank."""
    original(head, *args, **kwargs | {"use_attn_tp_group": kwargs.get("enable_tp", True)})


HOOKS = (
    Hook("sglang.srt.layers.linear._resolve_linear_group", HookType.AROUND, unsharded_group),
    Hook("sglang.srt.layers.vocab_parallel_embedding.ParallelLMHead.__init__", HookType.AROUND, unsharded_head),
)
