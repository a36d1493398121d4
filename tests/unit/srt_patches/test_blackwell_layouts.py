"""What SGLang makes of experts for its Blackwell backends, as far as no such GPU is needed to see it.

A rank prepares its shard by itself, so shards together have to be what all experts would have become; and what is made
for each expert beside the weights has to be found.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.srt_patches.checks import check_expert_state

EXPERTS, HIDDEN, INTER = 7, 256, 128


def shards(group_size: int) -> list[range]:
    placement = balanced(EXPERTS, group_size)
    return [placement.shard(rank) for rank in range(group_size)]


def trtllm_bf16(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, Any]:
    """`flashinfer_trtllm`'s layout of bf16 experts `[E, rows, columns]`, and SGLang's method that made it."""
    method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    method._cache_permute_indices = {}
    layer = SimpleNamespace(num_local_experts=len(weight), moe_runner_config=SimpleNamespace(is_gated=True))
    parameter = torch.nn.Parameter(weight.clone(), requires_grad=False)
    method._apply_trtllm_bf16_block_layout(layer, parameter, name)
    return parameter.data, method


@pytest.mark.parametrize(("name", "size"), [("w13_weight", (2 * INTER, HIDDEN)), ("w2_weight", (HIDDEN, INTER))])
@pytest.mark.parametrize("group_size", [2, 3])
def test_bf16_blocks_are_made_expert_by_expert(name: str, size: tuple[int, int], group_size: int) -> None:
    weight = torch.randn(EXPERTS, *size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole, method = trtllm_bf16(weight, name)
    assert whole.shape[0] == EXPERTS
    assert whole.ndim == 4  # experts of blocks: still one after another
    assert whole.is_contiguous()
    assert not torch.equal(whole.reshape(weight.shape), weight)
    parts = [trtllm_bf16(weight[part.start : part.stop], name)[0] for part in shards(group_size)]
    assert torch.equal(torch.cat(parts), whole)
    # What the method keeps is for any expert, so it is no state that would have to grow with them.
    for part in shards(group_size):
        check_expert_state(SimpleNamespace(layer_id=0, num_local_experts=len(part), quant_method=method))


class Layer(torch.nn.Module):
    """A FusedMoE, as far as these methods read it."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_local_experts = experts
        self.w13_weight = torch.nn.Parameter(torch.zeros(experts, 2 * INTER, HIDDEN), requires_grad=False)


def test_block_fp8_activation_parameters_are_found_as_expert_tensors() -> None:
    method = Fp8MoEMethod.__new__(Fp8MoEMethod)
    method.moe_runner_config = SimpleNamespace(
        gemm1_clamp_limit=None, swiglu_limit=7.0, gemm1_alpha=1.702, gemm1_beta=None
    )
    parts = []
    for part in shards(3):
        layer = Layer(len(part))
        method._prepare_flashinfer_trtllm_activation_params(layer)
        parts.append(dict(FusedMoE.named_per_expert_tensors(layer, len(part))))
    names = {"_flashinfer_trtllm_gemm1_alpha", "_flashinfer_trtllm_gemm1_clamp_limit"}
    assert all(set(part) == names for part in parts)
    whole = Layer(EXPERTS)
    method._prepare_flashinfer_trtllm_activation_params(whole)
    for name, value in FusedMoE.named_per_expert_tensors(whole, EXPERTS):
        assert torch.equal(torch.cat([part[name] for part in parts]), value)
    # And they can be bound for all experts, although they are no parameters.
    layer = Layer(2)
    method._prepare_flashinfer_trtllm_activation_params(layer)
    FusedMoE.replace_expert_tensor(layer, "_flashinfer_trtllm_gemm1_alpha", whole._flashinfer_trtllm_gemm1_alpha)
    assert len(layer._flashinfer_trtllm_gemm1_alpha) == EXPERTS


@pytest.mark.parametrize("backend", [MoeRunnerBackend.FLASHINFER_TRTLLM, MoeRunnerBackend.FLASHINFER_TRTLLM_ROUTED])
def test_the_kernel_is_told_of_all_experts(backend: MoeRunnerBackend) -> None:
    """`bind_full_expert_weights` collapses what the kernels take as the part of this rank."""
    layer = SimpleNamespace(
        moe_ep_size=1,
        moe_ep_rank=0,
        _num_local_routed=3,
        _num_global_routed=EXPERTS,
        num_local_experts=3,
        num_experts=EXPERTS,
        moe_runner_config=SimpleNamespace(num_local_experts=3),
        dispatcher=SimpleNamespace(),
        runner_backend=backend,
    )
    FusedMoE.bind_full_expert_weights(layer, {})
    assert layer.num_local_experts == layer.moe_runner_config.num_local_experts == EXPERTS
    assert layer.moe_ep_rank * layer.num_local_experts == 0  # the offset of its first expert
    assert layer.dispatcher.local_expert_mapping is None
