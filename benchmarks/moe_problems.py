"""MoE layers to compare kernels on: random experts in three formats, each kernel's call, and a float64 reference.

Expert tensors are dicts of `[num_experts, …]` tensors; names that begin with w are weights, the others belong to
them. `make` gives them as a checkpoint has them ([gate; up]), `for_flashinfer` as FlashInfer reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sglang_dwdp.block_fp8 import BLOCK, block_fp8_moe, swap_halves

Experts = Mapping[str, torch.Tensor]
FORMATS = ("bf16", "fp8-block", "mxfp4")
ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0  # gpt-oss
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32  # MXFP4 values that share one scale


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer's sizes; gpt-oss's are padded as SGLang pads them."""

    name: str
    num_experts: int
    hidden: int
    inter: int
    top_k: int


QWEN3_30B = Shape("Qwen3-30B-A3B", 128, 2048, 768, 8)
DEEPSEEK_R1 = Shape("DeepSeek-R1", 256, 7168, 2048, 8)
GPT_OSS_120B = Shape("gpt-oss-120b", 128, 3072, 2944, 4)


@dataclass(frozen=True, slots=True)
class Case:
    """One forward's input.  x: bf16 `[T, H]`.  ids: int32 `[T, k]`.  weights: float32 `[T, k]`."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def make_case(shape: Shape, tokens: int, *, skewed: bool = False, seed: int = 1) -> Case:
    """Random input. skewed: almost all tokens go to the last expert first."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, generator=generator, device="cuda").to(torch.bfloat16)
    logits = torch.randn(tokens, shape.num_experts, generator=generator, device="cuda")
    if skewed:
        logits[:, -1] += 100
    weights, ids = logits.softmax(-1).topk(shape.top_k)
    return Case(x, ids.int(), weights.contiguous())


def make(weight_format: str, shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random experts whose output is about as large as their input."""
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = {
        "13": (shape.num_experts, 2 * shape.inter, shape.hidden),
        "2": (shape.num_experts, shape.hidden, shape.inter),
    }
    result: dict[str, torch.Tensor] = {}
    for name, size in sizes.items():
        experts, rows, columns = size
        spread = columns**-0.5
        if weight_format == "mxfp4":
            packed = torch.randint(0, 256, (experts, rows, columns // 2), generator=generator, device="cuda")
            result[f"w{name}"] = packed.to(torch.uint8)
            # The mean square of the 16 values is about 8.6; E8M0 has powers of two, 127 stands for 1.
            middle = 127 + round(float(torch.log2(torch.tensor(spread / 8.6**0.5))))
            scales = torch.randint(
                middle - 1, middle + 2, (experts, rows, columns // _GROUP), generator=generator, device="cuda"
            )
            result[f"s{name}"] = scales.to(torch.uint8)
            bias = torch.randn(experts, rows, generator=generator, device="cuda")
            result[f"b{name}"] = (bias / 8).to(torch.bfloat16)
            continue
        weight = torch.empty(
            size, dtype=torch.bfloat16 if weight_format == "bf16" else torch.float8_e4m3fn, device="cuda"
        )
        for expert in weight:  # one at a time: a layer of DeepSeek-R1 in float32 would fill the GPU
            noise = torch.randn(rows, columns, generator=generator, device="cuda")
            expert.copy_(noise * (spread if weight_format == "bf16" else 1.0))
        result[f"w{name}"] = weight
        if weight_format == "fp8-block":
            blocks = (experts, -(-rows // BLOCK), -(-columns // BLOCK))
            result[f"s{name}"] = spread * (0.5 + torch.rand(blocks, generator=generator, device="cuda"))
    return result


def for_flashinfer(weight_format: str, experts: Experts) -> dict[str, torch.Tensor]:
    """The same experts as FlashInfer reads them: [up; gate], and 4-bit weights interleaved."""
    result = {name: tensor.clone() for name, tensor in experts.items()}
    for name in ("w13", "s13", "b13"):
        if name in result:
            swap_halves(result[name])
    if weight_format == "mxfp4":
        from flashinfer.fused_moe import (
            interleave_moe_scales_for_sm90_mixed_gemm,
            interleave_moe_weights_for_sm90_mixed_gemm,
        )

        for name in ("13", "2"):
            result[f"w{name}"] = interleave_moe_weights_for_sm90_mixed_gemm(result[f"w{name}"], "fp4")
            scales = interleave_moe_scales_for_sm90_mixed_gemm(result[f"s{name}"], group_size=_GROUP)
            result[f"s{name}"] = scales.contiguous()
        count = result["w2"].shape[0]
        for name, value in (("alpha", ALPHA), ("beta", BETA), ("limit", LIMIT)):
            result[name] = torch.full((count,), value, device="cuda")
    return result


def run_flashinfer(
    weight_format: str,
    case: Case,
    experts: Experts,
    *,
    fused_finalize: bool = False,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """FlashInfer's fused MoE with its first tactic, bf16 `[T, H]`; without fused_finalize, the same bits every time."""
    if weight_format == "fp8-block":
        return block_fp8_moe(
            case.x,
            case.ids,
            case.weights,
            experts["w13"],
            experts["s13"],
            experts["w2"],
            experts["s2"],
            workspace=workspace,
            fused_finalize=fused_finalize,
        )
    from flashinfer.fused_moe import cutlass_fused_moe

    output = torch.empty_like(case.x)
    more = {}
    if weight_format == "mxfp4":
        more = {
            "fc1_expert_biases": experts["b13"],
            "fc2_expert_biases": experts["b2"],
            "swiglu_alpha": experts["alpha"],
            "swiglu_beta": experts["beta"],
            "swiglu_limit": experts["limit"],
            "use_w4_group_scaling": True,
        }
    cutlass_fused_moe(
        case.x,
        case.ids,
        case.weights,
        experts["w13"],
        experts["w2"],
        torch.bfloat16,
        quant_scales=[experts[name].view(torch.int32) for name in ("s13", "s2")] if weight_format == "mxfp4" else None,
        output=output,
        use_fused_finalize=fused_finalize,
        workspace_buffer=workspace,
        **more,
    )
    return output


def run_triton(weight_format: str, case: Case, experts: Experts) -> torch.Tensor:
    """SGLang's Triton kernel, bf16 `[T, H]`. For MXFP4 `experts` are those of `as_bf16`: it has no such kernel."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts_impl

    more: dict[str, object] = {}
    if weight_format == "fp8-block":
        more = {
            "use_fp8_w8a8": True,
            "w1_scale": experts["s13"],
            "w2_scale": experts["s2"],
            "block_shape": [BLOCK, BLOCK],
        }
    if weight_format == "mxfp4":
        more = {
            "b1": experts["b13"],
            "b2": experts["b2"],
            "gemm1_alpha": ALPHA,
            "gemm1_limit": LIMIT,
            "gate_up_interleaved": False,
        }
    result: torch.Tensor = fused_experts_impl(
        case.x.clone(), experts["w13"], experts["w2"], case.weights, case.ids, **more
    )
    return result


def dequantized(weight_format: str, experts: Experts, expert: int, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One expert's weight (`name` is "13" or "2") as `[rows, columns]` of `dtype`."""
    weight = experts[f"w{name}"][expert]
    if weight_format == "bf16":
        return weight.to(dtype)
    scale = experts[f"s{name}"][expert]
    if weight_format == "fp8-block":
        rows, columns = weight.shape
        spread = scale.to(dtype).repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return weight.to(dtype) * spread
    values = torch.tensor((*_E2M1, *(-value for value in _E2M1)), dtype=dtype, device=weight.device)
    unpacked = torch.stack((values[(weight & 15).long()], values[(weight >> 4).long()]), dim=-1).flatten(-2)
    return unpacked * torch.exp2(scale.to(dtype) - 127).repeat_interleave(_GROUP, -1)


def reference(weight_format: str, case: Case, experts: Experts) -> torch.Tensor:
    """The layer in float64, from checkpoint-ordered experts: float64 `[T, H]`."""
    x = case.x.double()
    output = torch.zeros_like(x)
    for expert in case.ids.unique().tolist():
        token, slot = (case.ids == expert).nonzero(as_tuple=True)
        gate_up = x[token] @ dequantized(weight_format, experts, expert, "13", torch.float64).T
        if "b13" in experts:
            gate_up += experts["b13"][expert].double()
        gate, up = gate_up.chunk(2, dim=-1)
        if weight_format == "mxfp4":
            gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
            activated = (up + BETA) * gate * torch.sigmoid(ALPHA * gate)
        else:
            activated = torch.nn.functional.silu(gate) * up
        result = activated @ dequantized(weight_format, experts, expert, "2", torch.float64).T
        if "b2" in experts:
            result += experts["b2"][expert].double()
        output.index_add_(0, token, result * case.weights[token, slot, None].double())
    return output


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """‖output − exact‖ / ‖exact‖."""
    return float((output.double() - exact).norm() / exact.norm())


def as_bf16(weight_format: str, experts: Experts) -> dict[str, torch.Tensor]:
    """The experts with bf16 weights, for kernels that lack the format."""
    result = {name: tensor for name, tensor in experts.items() if not name.startswith(("w", "s"))}
    for name in ("13", "2"):
        count = experts[f"w{name}"].shape[0]
        rows = [dequantized(weight_format, experts, expert, name, torch.bfloat16) for expert in range(count)]
        result[f"w{name}"] = torch.stack(rows)
    return result
