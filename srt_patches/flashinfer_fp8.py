"""Block-FP8 experts through FlashInfer: what `--moe-runner-backend flashinfer_cutlass` means for them with DWDP.

SGLang runs these experts on Triton where that backend is asked for. Its registry takes backends from outside, but
its FP8 method asks for known ones by name, so two of its methods are hooked for the layers that run on this one.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore, MoeQuantInfo
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner, register_moe_runner_core
from sglang.srt.layers.moe.utils import get_moe_runner_backend, resolve_moe_runner_backend
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.block_fp8 import (
    BLOCK,
    Sizes,
    Workspace,
    block_fp8_moe,
    dummy_routing,
    run_time_compiler,
    swap_halves,
    warm_up_tokens,
)
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.support.backends import FLASHINFER_FP8, HOPPER
from sglang_dwdp.support.gpu import gpu_generation

logger = logging.getLogger(__name__)
_workspace = functools.cache(Workspace)  # by device


@dataclass
class BlockFp8QuantInfo(MoeQuantInfo):
    """What the kernel reads: `w13`, `w13_scale`, `w2` and `w2_scale` of `block_fp8.block_fp8_moe`."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

    def sizes(self, top_k: int) -> Sizes:
        """The sizes that the tensors show, for `top_k` experts of a token."""
        num_experts, hidden, inter = self.tensors[2].shape
        return Sizes(num_experts, hidden, inter, top_k)


class FlashInferBlockFp8Core(DispatchMoeRunnerCore):
    """Runs block-FP8 experts with FlashInfer's fused MoE."""

    @property
    def runner_backend(self) -> Any:
        """The backend's name, as SGLang's registry wraps it."""
        return resolve_moe_runner_backend(FLASHINFER_FP8)

    def run_from_dispatch(self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None) -> Any:
        """One layer."""
        from sglang.srt.environ import envs
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        hidden = dispatch_output.hidden_states
        weights, ids, _ = dispatch_output.topk_output
        fused_finalize = envs.SGLANG_FLASHINFER_MOE_FUSED_FINALIZE.get()
        workspace = None
        if len(hidden):
            sizes = quant_info.sizes(ids.shape[1])
            workspace = _workspace(hidden.device).take(sizes, len(hidden), fused_finalize=fused_finalize)
        output = block_fp8_moe(
            hidden, ids, weights, *quant_info.tensors, workspace=workspace, fused_finalize=fused_finalize
        )
        if runner_config.routed_scaling_factor is not None:
            output.mul_(runner_config.routed_scaling_factor)
        return StandardCombineInput(hidden_states=output)


def eligible(method: Any, config: Any) -> str | None:
    """Why a layer of SGLang's FP8 method cannot take this backend; None: it can."""
    if not method.block_quant or method.use_mxfp8 or method.is_fp4_expert:
        return "its weights are not block-FP8"
    if list(method.weight_block_size or []) != [BLOCK, BLOCK]:
        return f"its blocks are {method.weight_block_size}, not {BLOCK} by {BLOCK}"
    if config.hidden_size % BLOCK or config.intermediate_size_per_partition % BLOCK:
        return f"its sizes are not multiples of {BLOCK}"
    if config.activation != "silu" or not config.is_gated:
        return f"its activation is {config.activation}"
    given = ("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit", "apply_router_weight_on_input", "no_combine")
    used = [name for name in given if getattr(config, name)]
    if used:
        return f"it uses {', '.join(used)}"
    return None


def create_runner(original: Callable[..., None], method: Any, layer: Any, config: Any) -> None:
    """Around `Fp8MoEMethod.create_moe_runner`."""
    if not get_moe_runner_backend().is_flashinfer_cutlass() or gpu_generation() != HOPPER:
        original(method, layer, config)
        return
    reason = eligible(method, config)
    if reason is not None:
        logger.warning("layer %s runs its FP8 experts on Triton, not on FlashInfer: %s", config.layer_id, reason)
        original(method, layer, config)
        return
    method.moe_runner_config = config
    method.runner = MoeRunner(resolve_moe_runner_backend(FLASHINFER_FP8), config)
    method._owns_moe_runner = True


def runs_here(method: Any) -> bool:
    """Whether a layer's method has the runner of this module."""
    runner = getattr(method, "runner", None)
    return runner is not None and bool(runner.runner_backend.value == FLASHINFER_FP8)


def reorder(_result: None, method: Any, layer: Any) -> None:
    """After `Fp8MoEMethod.process_weights_after_loading`: [gate; up], as loaded, becomes [up; gate]."""
    if runs_here(method):
        swap_halves(layer.w13_weight.data)
        swap_halves(layer.w13_weight_scale_inv.data)


def restore_order(_result: None, method: Any, layer: Any) -> None:
    """After `Fp8MoEMethod.restore_weights_before_loading`, before new weights are loaded, of all experts or of some."""
    reorder(None, method, layer)


def apply(original: Callable[..., Any], method: Any, layer: Any, dispatch_output: Any) -> Any:
    """Around `Fp8MoEMethod.apply`."""
    if not runs_here(method):
        return original(method, layer, dispatch_output)
    return method.runner.run(dispatch_output, quant_info_of(layer))


def quant_info_of(layer: Any) -> BlockFp8QuantInfo:
    """The layer's tensors as they are bound now."""
    return BlockFp8QuantInfo((layer.w13_weight, layer.w13_weight_scale_inv, layer.w2_weight, layer.w2_weight_scale_inv))


def warm_up(model: torch.nn.Module, max_tokens: int) -> None:
    """Compile what FlashInfer compiles at run time, before graphs are captured and requests wait for it.

    Runs one layer of each size on its direct view. Without `nvcc` FlashInfer is told to use the kernel that its module
    has.
    """
    layers = [one for one in model.modules() if isinstance(one, FusedMoE) and runs_here(one.quant_method)]
    infos = [(quant_info_of(layer), layer.top_k) for layer in layers]
    if not infos:
        return
    counts = warm_up_tokens(max_tokens)
    if run_time_compiler(os.environ) is None:
        os.environ["TRTLLM_DG_ENABLED"] = "0"
        logger.warning("nvcc was not found (PATH, CUDA_HOME), so FlashInfer runs block-FP8 with its built-in kernel")
        counts = [max_tokens]
    for sizes, info in {info.sizes(top_k): info for info, top_k in infos}.items():
        logger.info("DWDP warms FlashInfer's block-FP8 kernels up: %d token counts up to %d", len(counts), max_tokens)
        device = info.tensors[0].device
        for tokens in reversed(counts):  # the workspace is made once, at its largest
            hidden = torch.zeros((tokens, sizes.hidden), dtype=torch.bfloat16, device=device)
            routing = dummy_routing(tokens, sizes.num_experts, sizes.top_k, device)
            block_fp8_moe(hidden, *routing, *info.tensors, workspace=_workspace(device).take(sizes, tokens))
        torch.cuda.synchronize(device)


def register() -> None:
    """Tell SGLang of the backend. Idempotent."""
    try:
        resolve_moe_runner_backend(FLASHINFER_FP8)
    except ValueError:
        register_moe_runner_core(FLASHINFER_FP8, FlashInferBlockFp8Core)


_METHOD = "sglang.srt.layers.quantization.fp8.Fp8MoEMethod"
HOOKS = (
    Hook(f"{_METHOD}.create_moe_runner", HookType.AROUND, create_runner),
    Hook(f"{_METHOD}.process_weights_after_loading", HookType.AFTER, reorder),
    Hook(f"{_METHOD}.restore_weights_before_loading", HookType.AFTER, restore_order),
    Hook(f"{_METHOD}.apply", HookType.AROUND, apply),
)
