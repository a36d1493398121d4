"""Experts of quantized checkpoints, from SGLang's loader to what is shared.

A rank loads and prepares its shard by itself, so shards together have to be what all experts become on one rank: every
tensor of them, and every number that is made of all experts. SGLang's own code runs here, on the CPU; of its kernels
those that put values in another order are stubs that tell orders apart, and so is the one that quantizes to FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import flashinfer
import pytest
import torch
from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
from sglang.srt.layers import moe
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_layer
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import fp8, get_quantization_config, marlin_utils_fp4, modelopt_quant
from sglang.srt.layers.quantization.awq import awq
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w8a8_fp8_moe as ct_fp8,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_wNa16_moe as ct_int,
)

from sglang_dwdp.experts.layer import tensors_of
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.srt_patches import experts, loading
from sglang_dwdp.srt_patches.checks import backend_of_layer, check_expert_state
from sglang_dwdp.srt_patches.experts import SglangLayer, drop_unread, load_all_input_scales
from sglang_dwdp.support.unwritten import mark_uninitialized
from tests.fixtures.expert_formats import FORMATS

EXPERTS, HIDDEN, INTER, RANKS = 7, 256, 128, 3
METHODS = {"gptq": "gptq_marlin", "awq": "awq_marlin"}
ONLINE = "fp8-online"
# Of other methods of SGLang, with the tensors of a format that is there.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8-static": ("fp8-modelopt", {"quant_method": "fp8", "activation_scheme": "static"}),
    "w8a8_fp8": ("fp8-channel", {"quant_method": "w8a8_fp8", "is_dynamic": True}),
}
PARTS = {"gate_proj": ("w13_", "w1"), "up_proj": ("w13_", "w3"), "down_proj": ("w2_", "w2")}


def reordered(b_q_weight: torch.Tensor, perm: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    """In place of Marlin's repacking of one expert: of its size, and another where the weight or the order is."""
    assert b_q_weight.numel() * 32 == size_k * size_n * num_bits
    tiles = b_q_weight.reshape(size_k // 16, size_n * num_bits // 2).flip(0)
    return tiles + perm.long().cumsum(0).sum().to(tiles.dtype) if perm.numel() else tiles.contiguous()


def reordered_awq(weight: torch.Tensor, perm: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    assert perm.shape == (len(weight), 0)
    return torch.stack([reordered(one, perm[0], size_k, size_n, num_bits) for one in weight])


def to_fp8(values: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    scale = values.float().abs().amax() / 448 if scale is None else scale
    return (values / scale).to(torch.float8_e4m3fn), scale


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_args: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_args: hopper)
    monkeypatch.setattr(modelopt_quant, "is_cuda", lambda: True)
    monkeypatch.setattr(modelopt_quant, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(awq, "verify_marlin_supported", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(gptq_kernels, "gptq_marlin_repack", reordered)
    monkeypatch.setattr(marlin_utils_fp4, "gptq_marlin_repack", reordered, raising=False)
    monkeypatch.setattr(awq_kernels, "awq_marlin_moe_repack", reordered_awq)
    for module in (modelopt_quant, ct_fp8, fp8):
        monkeypatch.setattr(module, "scaled_fp8_quant", to_fp8)
    monkeypatch.setattr(fused_layer, "_is_cpu", False)
    monkeypatch.setattr(fused_layer, "get_global_expert_location_metadata", lambda: None)
    monkeypatch.setattr(FusedMoE, "_map_global_expert_id_to_local_expert_id", experts.local_index)
    assert ct_int.gptq_marlin_moe_repack is gptq_kernels.gptq_marlin_moe_repack


class Layer(FusedMoE):
    """A FusedMoE layer with this rank's shard, without what FusedMoE's constructor asks of a server."""

    def __init__(self, config: Any, count: int, backend: MoeRunnerBackend) -> None:
        torch.nn.Module.__init__(self)
        self.layer_id, self.quant_config = 5, config
        self.num_experts = self._num_global_routed = EXPERTS
        self.num_local_experts = self._num_local_routed = count
        self.hidden_size, self.intermediate_size_per_partition = HIDDEN, INTER
        self.moe_tp_size, self.moe_tp_rank, self._has_fused_shared = 1, 0, False
        self.use_triton_kernels = self.uses_expert_location = self.use_presharded_weights = False
        self.use_flashinfer_trtllm_moe = backend.is_flashinfer_trtllm()
        self.moe_runner_config = MoeRunnerConfig(num_experts=EXPERTS, num_local_experts=count, layer_id=5)
        self.dispatcher = SimpleNamespace(set_quant_config=lambda _config: None)
        self.quant_method = config.get_quant_method(self, "model.layers.5.mlp.experts")
        self.quant_method.create_weights(
            layer=self,
            num_experts=count,
            hidden_size=HIDDEN,
            intermediate_size_per_partition=INTER,
            params_dtype=torch.bfloat16,
            weight_loader=self.weight_loader,
        )
        self.quant_method.create_moe_runner(self, self.moe_runner_config)
        self.runner_backend = self.quant_method.get_moe_runner_backend(self)
        load_all_input_scales(self)


Layer.__name__ = "FusedMoE"  # compressed-tensors' targets are names of classes


def config_of(name: str) -> Any:
    if name == ONLINE:
        return fp8.Fp8Config()
    described = OTHERS[name][1] if name in OTHERS else dict(FORMATS[name].config)
    method = METHODS.get(described["quant_method"], described["quant_method"])
    if method == "modelopt":
        method = "modelopt_fp8" if described["quant_algo"] == "FP8" else "modelopt_fp4"
    return get_quantization_config(method).from_config(described)


def checkpoint(name: str) -> Iterator[tuple[str, str, int, torch.Tensor]]:
    """Parameter, shard, expert, and tensor of all that a checkpoint has of a layer's experts."""
    generator = torch.Generator().manual_seed(0)
    name = OTHERS[name][0] if name in OTHERS else name
    for expert in range(EXPERTS):
        for part, (prefix, shard) in PARTS.items():
            size = (HIDDEN, INTER) if part == "down_proj" else (INTER, HIDDEN)
            weight = torch.randn(size, generator=generator) * 0.1
            packed = {"weight": weight.bfloat16()} if name == ONLINE else FORMATS[name].pack(weight, expert)
            for end, tensor in packed.items():
                yield prefix + end, shard, expert, tensor


def loaded(
    name: str,
    rank: int,
    ranks: int,
    monkeypatch: pytest.MonkeyPatch,
    backend: MoeRunnerBackend = MoeRunnerBackend.AUTO,
) -> Layer:
    """A rank's layer, ready to be shared."""
    placement = (
        balanced(EXPERTS, ranks)
        if ranks > 1
        else SimpleNamespace(
            num_experts=EXPERTS, shard=lambda _rank: range(EXPERTS), local_index=lambda _rank, expert: expert
        )
    )
    for module in (experts, loading):
        monkeypatch.setattr(module, "placement_of", lambda _layer: placement)
        monkeypatch.setattr(module, "rank_in_group", lambda: rank)
    with mark_uninitialized():
        layer = Layer(config_of(name), len(placement.shard(rank)), backend)
    model = torch.nn.Sequential(layer)
    for parameter, shard, expert, tensor in checkpoint(name):
        loading.load(FusedMoE.weight_loader, layer, getattr(layer, parameter), tensor, parameter, shard, expert)
    assert list(loading.unwritten(model)) == []
    assert list(loading.experts_amiss(model)) == []
    layer.quant_method.process_weights_after_loading(layer)
    drop_unread(layer)
    check_expert_state(layer)
    return layer


BACKENDS = {
    ONLINE: ("FP8", "triton"),
    "fp8-channel": ("FP8", "triton"),
    "fp8-tensor": ("FP8", "triton"),
    "fp8-modelopt": ("FP8", "triton"),
    "fp8-static": ("FP8", "triton"),
    "w8a8_fp8": ("FP8", "triton"),
    "gptq-int4": ("int4/int8", "marlin"),
    "gptq-int8": ("int4/int8", "marlin"),
    "awq": ("int4/int8", "marlin"),
    "int4": ("int4/int8", "marlin"),
    "int8": ("int4/int8", "marlin"),
    "nvfp4-modelopt": ("NVFP4", "marlin"),
    "nvfp4": ("NVFP4", "marlin"),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_shards_together_are_what_one_rank_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loaded(name, 0, 1, monkeypatch)
    of_all = {key for key, value in whole.named_parameters() if hasattr(value, "_sglang_require_global_experts")}
    expected = {key: value for key, value in SglangLayer(whole).shards().items() if key not in of_all}
    assert len(expected) >= 4  # two weights, each with scales
    parts = []
    for rank in range(RANKS):
        layer = loaded(name, rank, RANKS, monkeypatch)
        backend = backend_of_layer(layer)
        assert (backend.weights, backend.name) == BACKENDS[name]
        shared = SglangLayer(layer)
        tensors = tensors_of(shared, rank)  # experts one after another, as many as the rank's shard has
        assert [tensor.name for tensor in tensors] == list(expected)
        assert sum(shared.is_weight(tensor.name) for tensor in tensors) == 2
        parts.append({tensor: value.clone() for tensor, value in shared.shards().items()})
        for key, value in layer.named_parameters():
            if key not in parts[-1] and value.numel():  # of no expert, or of all: a largest input scale, for instance
                assert torch.equal(value.float(), getattr(whole, key).float()), key
        shared.bind(expected)
        for key, value in whole.named_parameters():
            assert getattr(layer, key).shape == value.shape, key
        assert layer.num_local_experts == layer.moe_runner_config.num_local_experts == EXPERTS
    for key, tensor in expected.items():
        joined = torch.cat([part[key] for part in parts])
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("backend", [MoeRunnerBackend.FLASHINFER_CUTLASS, MoeRunnerBackend.FLASHINFER_TRTLLM])
def test_nvfp4_for_blackwell(backend: MoeRunnerBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its two kernels multiply by is each expert's own; activations are scaled by the largest of all experts."""
    for module in (moe, modelopt_quant):
        monkeypatch.setattr(module, "get_moe_runner_backend", lambda: backend)
    monkeypatch.setattr(modelopt_quant, "get_platform", lambda: SimpleNamespace(is_blackwell=True))
    monkeypatch.setattr(flashinfer, "nvfp4_block_scale_interleave", lambda scales: scales.reshape(-1).flip(0))
    whole = loaded("nvfp4-modelopt", 0, 1, monkeypatch, backend)
    of_all = {key for key, value in whole.named_parameters() if hasattr(value, "_sglang_require_global_experts")}
    expected = {key: value for key, value in SglangLayer(whole).shards().items() if key not in of_all}
    assert {"g1_alphas", "g2_alphas"} < set(expected)
    assert ("w13_weight_scale" in expected) is backend.is_flashinfer_trtllm()  # one of two with the same content
    assert ("w13_blockscale_swizzled" in expected) is backend.is_flashinfer_cutlass()
    parts = []
    for rank in range(RANKS):
        layer = loaded("nvfp4-modelopt", rank, RANKS, monkeypatch, backend)
        assert backend_of_layer(layer).weights == "NVFP4"
        tensors_of(SglangLayer(layer), rank)
        parts.append(SglangLayer(layer).shards())
        assert torch.equal(layer.w13_input_scale_quant, whole.w13_input_scale_quant)
        assert layer.w13_input_scale_quant.ndim == 0
    for key, tensor in expected.items():
        joined = torch.cat([part[key] for part in parts])
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-modelopt", "fp8-static"])
def test_an_input_scale_is_the_largest_of_all_experts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [tensor.max() for parameter, *_, tensor in checkpoint(name) if parameter == "w13_input_scale"]
    for rank in range(RANKS):
        layer = loaded(name, rank, RANKS, monkeypatch)
        assert layer.w13_input_scale == max(every)
        own = balanced(EXPERTS, RANKS).shard(rank)
        largest = int(torch.stack(every).view(EXPERTS, 2)[:, 0].argmax())
        if largest not in own:
            assert layer.w13_input_scale > max(every[2 * own.start : 2 * own.stop])


@pytest.mark.parametrize(("name", "missing"), [("gptq-int8", "w13_g_idx"), ("int4", "w2_weight_scale")])
def test_what_a_format_needs_has_to_arrive_for_each_expert(
    name: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [one for one in checkpoint(name) if one[0] != missing or one[2] != 1]
    monkeypatch.setitem(globals(), "checkpoint", lambda _name: kept)
    with pytest.raises(AssertionError, match=missing):
        loaded(name, 0, RANKS, monkeypatch)


def test_marlin_does_not_read_nvfp4s_other_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = loaded("nvfp4-modelopt", 0, RANKS, monkeypatch)
    assert layer.w13_blockscale_swizzled is None
    assert "w13_blockscale_swizzled" not in SglangLayer(layer).shards()
    assert MoeRunnerBackend.MARLIN is layer.runner_backend


def test_mxfp4_for_marlin_is_made_expert_by_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "w13_weight": (2 * INTER, HIDDEN // 2),
        "w13_weight_scale": (2 * INTER, HIDDEN // 32),
        "w2_weight": (HIDDEN, INTER // 2),
        "w2_weight_scale": (HIDDEN, INTER // 32),
    }
    # Scales near 1, as their codes are: others have no value in bf16.
    loaded = {
        name: torch.randint(120, 130, (EXPERTS, *shape), dtype=torch.uint8, generator=generator)
        for name, shape in shapes.items()
    }
    for name, size in (("w13_weight_bias", 2 * INTER), ("w2_weight_bias", HIDDEN)):
        loaded[name] = torch.randn(EXPERTS, size, generator=generator).bfloat16()

    def prepared(own: range) -> dict[str, torch.Tensor]:
        layer = torch.nn.Module()
        for name, tensor in loaded.items():
            layer.register_parameter(
                name, torch.nn.Parameter(tensor[own.start : own.stop].clone(), requires_grad=False)
            )
        marlin_utils_fp4.deinterleave_moe_mxfp4_w13_for_marlin(layer)
        marlin_utils_fp4.prepare_moe_mxfp4_layer_for_marlin(layer)
        return {name: value.data for name, value in layer.named_parameters()}

    expected = prepared(range(EXPERTS))
    parts = [prepared(balanced(EXPERTS, RANKS).shard(rank)) for rank in range(RANKS)]
    assert set(expected) == set(loaded)
    for name, tensor in expected.items():
        assert all(part[name].is_contiguous() for part in parts), name
        assert torch.equal(torch.cat([part[name].view(torch.uint8) for part in parts]), tensor.view(torch.uint8)), name
