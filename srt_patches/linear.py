"""Linear layers: a DWDP rank runs its requests alone, so none of its layers is sharded.

SGLang takes care of attention, of dense layers and of the LM head by the server's arguments, but shards some
layers over the tensor-parallel group nevertheless: the shared experts of DeepSeek and Qwen2-MoE, for instance,
whose partial sums nobody would add up (wrong tokens and no error with SGLang's own --dwdp-size), and the LM head of
MiniMax-M2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.support.models import WITHOUT_DP_ATTENTION


def unsharded_group(original: Callable[[Any], Any], parallel_group: Any) -> Any:
    """Around `_resolve_linear_group`: no group to shard over, except attention's, which has one rank."""
    return original(parallel_group) if parallel_group == "attn_tp" else None


def unsharded_head(original: Callable[..., None], head: Any, *args: Any, **kwargs: Any) -> None:
    """Around `ParallelLMHead.__init__`: sharded over attention's group at most, which has one rank."""
    original(head, *args, **kwargs | {"use_attn_tp_group": kwargs.get("enable_tp", True)})


def unsharded_model(
    architectures: Iterable[str] | None, *, is_dense_draft: bool = False
) -> AbstractContextManager[Any]:
    """Where a model is constructed, which SGLang shards over all ranks for want of attention data parallelism.

    In here it finds a single rank, so that it makes all heads and the complete embedding, and sums nothing over ranks.
    So does every draft model without experts, of which there is nothing to share.
    """
    if not is_dense_draft and not WITHOUT_DP_ATTENTION.intersection(architectures or ()):
        return nullcontext()
    parallel = get_parallel()
    sizes = dict.fromkeys(("tp_size", "attn_tp_size", "attn_dp_size", "moe_ep_size", "moe_dp_size", "moe_tp_size"), 1)
    ranks = {name.replace("_size", "_rank"): 0 for name in sizes}
    group = parallel.attn_tp_group  # of this rank alone
    context: AbstractContextManager[Any] = parallel.override(**sizes, **ranks, tp_group=group)
    return context


def keep_rows_of_tokens(model: torch.nn.Module) -> None:
    """Let a constructed model's queries have a row for each token.

    Hunyuan's norm leaves them with a row for each head. With attention data parallelism SGLang takes the rows beyond
    the number of tokens for padding, and its attention for plain CPUs returns what has the shape of the queries.
    """
    for module in model.modules():
        if type(module).__name__ == "HunYuanAttention" and module.use_qk_norm:
            norm: Any = module.query_layernorm
            norm.register_forward_hook(functools.partial(_rows_of, module.q_size))


def _rows_of(size: Any, _norm: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.view(-1, size)


HOOKS = (
    Hook("sglang.srt.layers.linear._resolve_linear_group", HookType.AROUND, unsharded_group),
    Hook("sglang.srt.layers.vocab_parallel_embedding.ParallelLMHead.__init__", HookType.AROUND, unsharded_head),
)
