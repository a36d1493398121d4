"""What can be said of FusedMoE without a server: the rest is in tests/e2e."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches import checks, experts
from sglang_dwdp.srt_patches.checks import (
    backend_of_layer,
    check_constructed,
    check_expert_state,
    check_heads,
    check_layer_numbers,
    check_not_sharded,
    check_own_forward,
)
from sglang_dwdp.srt_patches.experts import collect_all, rebuild_state
from sglang_dwdp.support.backends import Status


class UnquantizedFusedMoEMethod:
    """Stands for SGLang's method of this name."""


class Fp8MoEMethod:
    """Stands for SGLang's method of this name."""


def layer(method: object, backend: MoeRunnerBackend | None, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(layer_id=3, quant_method=method, runner_backend=backend, num_local_experts=4, **more)


def test_a_backend_that_was_validated_on_gpus() -> None:
    backend = backend_of_layer(layer(UnquantizedFusedMoEMethod(), MoeRunnerBackend.TRITON))
    assert backend.status is Status.VALIDATED


@pytest.mark.parametrize(
    ("method", "backend", "reason"),
    [
        (Fp8MoEMethod(), MoeRunnerBackend.CUTLASS, "tables of pointers"),
        (Fp8MoEMethod(), MoeRunnerBackend.MARLIN, "was not examined"),
        (UnquantizedFusedMoEMethod(), None, "was not examined"),
    ],
)
def test_unsupported_backends(method: object, backend: MoeRunnerBackend | None, reason: str) -> None:
    with pytest.raises(DwdpConfigError, match=rf"layer 3: .* cannot read shared experts: .*{reason}"):
        backend_of_layer(layer(method, backend))


def test_layers_that_could_not_be_told_apart_are_unsupported() -> None:
    check_layer_numbers([SimpleNamespace(layer_id=number) for number in (0, 1, 2)])
    with pytest.raises(DwdpConfigError, match="2 FusedMoE layers of this model have the number 1"):
        check_layer_numbers([SimpleNamespace(layer_id=number) for number in (0, 1, 1)])


@pytest.mark.parametrize(("flag", "kind"), [("use_mxfp8", "MXFP8"), ("is_fp4_expert", "FP4")])
def test_other_experts_of_the_fp8_method_are_unsupported(flag: str, kind: str) -> None:
    method = Fp8MoEMethod()
    vars(method).update({"block_quant": True, flag: True})
    with pytest.raises(DwdpConfigError, match=f"layer 3: {kind} experts of SGLang's FP8 method were not examined"):
        backend_of_layer(layer(method, MoeRunnerBackend.TRITON))


def test_fp8_in_blocks_and_with_fewer_scales_are_two_formats() -> None:
    method = Fp8MoEMethod()
    vars(method).update(block_quant=True, use_mxfp8=False, is_fp4_expert=False)
    assert backend_of_layer(layer(method, MoeRunnerBackend.TRITON)).weights == "block-FP8"
    vars(method).update(block_quant=False)
    assert backend_of_layer(layer(method, MoeRunnerBackend.TRITON)).weights == "FP8"
    with pytest.raises(DwdpConfigError, match=r"Use --moe-runner-backend triton, or serve"):
        backend_of_layer(layer(method, MoeRunnerBackend.DEEP_GEMM))


def test_a_layer_has_the_format_of_its_scheme() -> None:
    scheme = type("AWQMoEScheme", (), {})()
    backend = backend_of_layer(layer(object(), MoeRunnerBackend.MARLIN, scheme=scheme))
    assert (backend.weights, backend.name) == ("int4/int8", "marlin")


def test_blocks_are_compared_with_whole_experts() -> None:
    """192 columns on each of 4 ranks would be no number of blocks; an expert's 768 are."""

    def runner(width: int) -> SimpleNamespace:
        config = SimpleNamespace(quantization_config={"weight_block_size": [128, 128]})
        text = SimpleNamespace(moe_intermediate_size=width)
        return SimpleNamespace(model_config=SimpleNamespace(hf_config=config, hf_text_config=text))

    experts.check_blocks(runner(768))
    with pytest.raises(ValueError, match="weight_block_size_n=128"):
        experts.check_blocks(runner(800))


def test_per_expert_state_that_is_known_is_rebuilt_for_all_experts() -> None:
    config = MoeRunnerConfig(gemm1_alpha=1.702, gemm1_clamp_limit=7.0)
    few = torch.ones(2)
    moe = layer(
        UnquantizedFusedMoEMethod(),
        MoeRunnerBackend.FLASHINFER_CUTLASS,
        moe_runner_config=config,
        w13_weight=torch.zeros(4, 2, 2),
        _cutlass_swiglu_params=(few, few, few),
    )
    rebuild_state(moe)
    alpha, beta, limit = moe._cutlass_swiglu_params
    assert alpha.tolist() == pytest.approx([1.702] * 4)
    assert (beta.tolist(), limit.tolist()) == ([1.0] * 4, [7.0] * 4)


@pytest.mark.parametrize("owner", ["layer", "method"])
def test_per_expert_state_that_is_not_known_is_unsupported(owner: str) -> None:
    moe = layer(UnquantizedFusedMoEMethod(), MoeRunnerBackend.TRITON, _cutlass_swiglu_params=(torch.ones(4),))
    check_expert_state(moe)
    vars(moe if owner == "layer" else moe.quant_method)["table"] = (torch.ones(4),)
    with pytest.raises(DwdpConfigError, match=r"\.table holds something for each of the 4 experts"):
        check_expert_state(moe)


def test_a_layer_with_a_forward_of_its_own_is_unsupported() -> None:
    class Own(FusedMoE):
        def run_moe_core(self, dispatch_output: Any) -> Any:
            return dispatch_output

    check_own_forward(object.__new__(FusedMoE))
    moe = object.__new__(Own)
    moe.__dict__["layer_id"] = 3
    with pytest.raises(DwdpConfigError, match=r"layer 3: Own replaces FusedMoE\.run_moe_core"):
        check_own_forward(moe)


def test_a_model_that_is_sharded_in_spite_of_data_parallelism() -> None:
    embedding = object.__new__(VocabParallelEmbedding)
    torch.nn.Module.__init__(embedding)
    model = torch.nn.Sequential(embedding)
    embedding.tp_size = 1
    check_not_sharded(model)
    embedding.tp_size = 2
    with pytest.raises(DwdpConfigError, match=r"SGLang shards 0 of Sequential over 2 ranks"):
        check_not_sharded(model)


def test_a_model_without_moe_layers() -> None:
    with pytest.raises(DwdpConfigError, match="Linear has no FusedMoE layer"):
        check_constructed(torch.nn.Linear(2, 2))


def test_a_draft_model_without_moe_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    check_constructed(torch.nn.Linear(2, 2), is_draft=True)


def test_layers_of_a_draft_model_are_numbered_after_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "placement_of", lambda _layer: None)

    def model(*numbers: int) -> torch.nn.Module:
        layers = [quantized(UnquantizedFusedMoEMethod()) for _ in numbers]
        for moe, number in zip(layers, numbers, strict=True):
            moe.layer_id = number
            moe.w13_weight, moe.w2_weight = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        return torch.nn.Sequential(*layers)

    drafts = [model(0, 1), model(0), torch.nn.Linear(2, 2)]
    layers = collect_all(model(1, 3), drafts, "cpu")
    assert [layer.layer_id for layer in layers] == [1, 3, 4, 5, 6]
    assert [layer.fused.layer_id for layer in layers] == [1, 3, 4, 5, 6]


def test_a_model_whose_attention_is_divided_in_spite_of_data_parallelism() -> None:
    def attention(heads: int) -> RadixAttention:
        return RadixAttention(heads, 8, 1.0, num_kv_heads=1, layer_id=0)

    model = torch.nn.Sequential(attention(4), attention(4))
    model.config = SimpleNamespace(num_attention_heads=8)  # type: ignore[assignment]
    with pytest.raises(DwdpConfigError, match="divides the 8 attention heads of Sequential among 2 ranks"):
        check_heads(model, 2)
    check_heads(model, 4)
    check_heads(torch.nn.Sequential(attention(8), attention(4)), 2)  # nothing is known of it
    mixed = torch.nn.Sequential(attention(8), attention(4))
    mixed.config = SimpleNamespace(text_config=SimpleNamespace(num_attention_heads=8))  # type: ignore[assignment]
    check_heads(mixed, 2)


def quantized(method: object, *, weighs_input: bool = False) -> FusedMoE:
    moe = object.__new__(FusedMoE)
    torch.nn.Module.__init__(moe)
    vars(moe).update(layer_id=3, quant_method=method, runner_backend=None, num_fused_shared_experts=0)
    moe.moe_runner_config = MoeRunnerConfig(apply_router_weight_on_input=weighs_input)
    return moe


def test_quantized_experts_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    check_constructed(torch.nn.Sequential(quantized(UnquantizedFusedMoEMethod())))
    with pytest.raises(DwdpConfigError, match="layer 3: the CPU engine has no kernels for the experts of Fp8MoEMethod"):
        check_constructed(torch.nn.Sequential(quantized(Fp8MoEMethod())))


def test_what_the_cpu_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    model = torch.nn.Sequential(quantized(UnquantizedFusedMoEMethod(), weighs_input=True))
    with pytest.raises(DwdpConfigError, match="layer 3: the CPU engine cannot weigh what experts read"):
        check_constructed(model)
