"""Block-FP8 experts through FlashInfer: what `--moe-runner-backend flashinfer_cutlass` means for them with DWDP.

SGLang runs these experts on Triton where that backend is asked for. Its registry takes backends from outside, but
its FP8 method asks for known ones by name, so two of its methods are hooked for the layers that run on this one.
"""

from __future__ import annotations

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
_workspaces: dict[torch.device, Workspace] = {}


@dataclass
class BlockFp8QuantInfo(MoeQuantInfo):
    """What the kernel reads; see `block_fp8.block_fp8_moe` for shapes and dtypes."""

    w13_weight: torch.Tensor
    w13_scale: torch.Tensor
    w2_weight: torch.Tensor
    w2_scale: torch.Tensor


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

        hidden_states = dispatch_output.hidden_states
        topk_weights, topk_ids, _ = dispatch_output.topk_output
        sizes = sizes_of(quant_info, topk_ids.shape[1])
        workspace = _workspaces.setdefault(hidden_states.device, Workspace(hidden_states.device))
        output = block_fp8_moe(
            hidden_states,
            topk_ids,
            topk_weights,
            quant_info.w13_weight,
            quant_info.w13_scale,
            quant_info.w2_weight,
            quant_info.w2_scale,
            workspace=workspace.take(sizes, hidden_states.shape[0]) if hidden_states.shape[0] else None,
            fused_finalize=envs.SGLANG_FLASHINFER_MOE_FUSED_FINALIZE.get(),
        )
        if runner_config.routed_scaling_factor is not None:
            output.mul_(runner_config.routed_scaling_factor)
        return StandardCombineInput(hidden_states=output)


def sizes_of(info: BlockFp8QuantInfo, top_k: int) -> Sizes:
    """The sizes that the tensors show."""
    num_experts, hidden, inter = info.w2_weight.shape
    return Sizes(num_experts, hidden, inter, top_k)


def eligible(method: Any, config: Any) -> str | None:
    """Why a layer of SGLang's FP8 method cannot take this backend; None: it can."""
    if not method.block_quant or method.use_mxfp8 or method.is_fp4_expert:
        return "its weights are not block-FP8"
    if list(method.weight_block_size or []) != [BLOCK, BLOCK]:
        return f"its blocks are {method.weight_block_size}, not {BLOCK} by {BLOCK}"
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
    Sizes(config.num_experts, config.hidden_size, config.intermediate_size_per_partition, 1).check(config.layer_id)
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


def apply(original: Callable[..., Any], method: Any, layer: Any, dispatch_output: Any) -> Any:
    """Around `Fp8MoEMethod.apply`."""
    if not runs_here(method):
        return original(method, layer, dispatch_output)
    return method.runner.run(dispatch_output, quant_info_of(layer))


def quant_info_of(layer: Any) -> BlockFp8QuantInfo:
    """The layer's tensors as they are bound now."""
    return BlockFp8QuantInfo(layer.w13_weight, layer.w13_weight_scale_inv, layer.w2_weight, layer.w2_weight_scale_inv)


def warm_up(model: torch.nn.Module, max_tokens: int) -> None:
    """Compile what FlashInfer compiles at run time, before graphs are captured and requests wait for it.

    Runs one layer of each size on its direct view. Without `nvcc` FlashInfer is told to use the kernel that its module
    has.
    """
    compiles = run_time_compiler(os.environ) is not None
    done: set[Sizes] = set()
    for layer in model.modules():
        if not isinstance(layer, FusedMoE) or not runs_here(layer.quant_method):
            continue
        info = quant_info_of(layer)
        sizes = sizes_of(info, layer.top_k)
        if sizes in done:
            continue
        done.add(sizes)
        device = info.w13_weight.device
        workspace = _workspaces.setdefault(device, Workspace(device))
        if not compiles:
            os.environ["TRTLLM_DG_ENABLED"] = "0"
            logger.warning(
                "nvcc was not found (PATH, CUDA_HOME), so FlashInfer runs block-FP8 with its built-in kernel"
            )
        counts = warm_up_tokens(max_tokens) if compiles else [max_tokens]
        logger.info("DWDP warms FlashInfer's block-FP8 kernels up: %d token counts up to %d", len(counts), max_tokens)
        for tokens in reversed(counts):  # the workspace is made once, at its largest
            hidden = torch.zeros((tokens, sizes.hidden), dtype=torch.bfloat16, device=device)
            ids, weights = dummy_routing(tokens, sizes.num_experts, sizes.top_k, device)
            block_fp8_moe(
                hidden,
                ids,
                weights,
                info.w13_weight,
                info.w13_scale,
                info.w2_weight,
                info.w2_scale,
                workspace=workspace.take(sizes, tokens),
            )
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
    Hook(f"{_METHOD}.apply", HookType.AROUND, apply),
)
