"""Block-FP8 experts through FlashInfer's fused MoE on Hopper, which SGLang itself does not call for this format.

Nothing here knows SGLang; `srt_patches/flashinfer_fp8.py` brings it there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 128
"""Rows and columns that share one scale."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a MoE layer.

    Attributes:
        num_experts: experts in its tensors.
        hidden: width of a token.
        inter: width of one expert between its two products.
        top_k: experts that a token chooses.
    """

    num_experts: int
    hidden: int
    inter: int
    top_k: int


def swap_halves(tensor: torch.Tensor) -> None:
    """Turn `[E, 2 N, …]` from [gate; up] to [up; gate] in place, expert by expert, or back.

    Takes the memory of half an expert more. For weights N is the intermediate size, for scales its blocks.

    Raises:
        ValueError: the second dimension is odd.
    """
    if tensor.shape[1] % 2:
        raise ValueError(f"{tuple(tensor.shape)} has no two halves in its second dimension")
    half = tensor.shape[1] // 2
    for expert in tensor:
        gate = expert[:half].clone()
        expert[:half].copy_(expert[half:])
        expert[half:].copy_(gate)


def warm_up_tokens(max_tokens: int) -> list[int]:
    """Numbers of tokens, ascending, whose forwards together compile every kernel that up to `max_tokens` need.

    FlashInfer compiles its grouped product at run time, for tiles that it chooses by the number of tokens: below 64
    by the number itself, above by how many blocks of 128 it makes, with another choice from 1,024 on.
    """
    few = range(1, min(64, max_tokens) + 1)
    blocks = range(128, max_tokens + 1, 128)
    return sorted({*few, *blocks, *(n + 1 for n in (64, *blocks) if n < max_tokens), max_tokens})


def run_time_compiler(environment: Mapping[str, str]) -> str | None:
    """The `nvcc` that FlashInfer would compile its block-FP8 product with; None: there is none."""
    home = environment.get("CUDA_HOME")
    candidate = environment.get("TRTLLM_DG_NVCC_COMPILER") or (f"{home}/bin/nvcc" if home else "nvcc")
    return shutil.which(candidate, path=environment.get("PATH"))


class Workspace:
    """The scratch memory of all MoE layers of one rank, which run one after another on one stream.

    It grows when asked for more, but not while a CUDA graph is captured. What it grew out of is kept, since graphs
    that were captured before write there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []
        # Tokens that the buffer was found large enough for.
        self._enough: dict[tuple[Sizes, bool], int] = {}

    def take(self, sizes: Sizes, num_tokens: int, *, fused_finalize: bool = True) -> torch.Tensor | None:
        """Scratch memory of at least what `block_fp8_moe` needs for `num_tokens` tokens, uint8.

        None while a graph is captured and there is too little: FlashInfer then allocates from the graph's own pool.
        """
        from flashinfer.fused_moe.core import cutlass_fused_moe_workspace_size

        key = (sizes, fused_finalize)
        if self._enough.get(key, 0) >= num_tokens:
            return self._buffers[-1]
        needed = cutlass_fused_moe_workspace_size(
            num_tokens,
            sizes.hidden,
            sizes.inter,
            sizes.num_experts,
            sizes.top_k,
            x_dtype=torch.bfloat16,
            weight_dtype=torch.float8_e4m3fn,
            use_deepseek_fp8_block_scale=True,
            use_fused_finalize=fused_finalize,
            device=self._device,
        )
        if not self._buffers or self._buffers[-1].numel() < needed:
            if torch.cuda.is_current_stream_capturing():
                return None
            self._buffers.append(torch.empty(needed, dtype=torch.uint8, device=self._device))
        self._enough[key] = max(num_tokens, self._enough.get(key, 0))
        return self._buffers[-1]


def block_fp8_moe(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    *,
    workspace: torch.Tensor | None = None,
    fused_finalize: bool = True,
) -> torch.Tensor:
    """The experts' weighted sum for each token, bf16 `[T, H]`.

    Args:
        hidden_states: bf16 `[T, H]`.
        topk_ids: `[T, k]` integers.
        topk_weights: `[T, k]`.
        w13: float8_e4m3fn `[E, 2 I, H]`, [up; gate].
        w13_scale: float32 `[E, 2 I/128, H/128]`, in the same order.
        w2: float8_e4m3fn `[E, H, I]`.
        w2_scale: float32 `[E, H/128, I/128]`.
        workspace: scratch memory; None: FlashInfer allocates it.
        fused_finalize: sum with atomics, so that two calls may differ in the last bits.
    """
    from flashinfer.fused_moe import cutlass_fused_moe

    output = torch.empty_like(hidden_states)
    if hidden_states.shape[0] == 0:
        return output
    cutlass_fused_moe(
        hidden_states,
        topk_ids.to(torch.int32),
        topk_weights.to(torch.float32),
        w13,
        w2,
        torch.bfloat16,
        quant_scales=[w13_scale, w2_scale],
        output=output,
        use_deepseek_fp8_block_scale=True,
        use_fused_finalize=fused_finalize,
        workspace_buffer=workspace,
    )
    return output


def dummy_routing(num_tokens: int, num_experts: int, top_k: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids `[T, k]`, int32, spread evenly and distinct for each token, and weights `[T, k]`, float32."""
    first = torch.arange(num_tokens, device=device, dtype=torch.int32)[:, None] * top_k
    ids = (first + torch.arange(top_k, device=device, dtype=torch.int32)) % num_experts
    return ids.to(torch.int32), torch.full((num_tokens, top_k), 1.0 / top_k, device=device)
