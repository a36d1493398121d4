"""Block-FP8 through FlashInfer, as far as it needs no GPU: which layers take it, and what they hand to the kernel."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import MoeRunnerBackend, resolve_moe_runner_backend

from sglang_dwdp.srt_patches import flashinfer_fp8
from sglang_dwdp.support.backends import FLASHINFER_FP8

SIZES = {"num_experts": 4, "hidden_size": 256, "intermediate_size_per_partition": 128, "layer_id": 3, "top_k": 2}


def method(**more: Any) -> SimpleNamespace:
    """Stands for SGLang's Fp8MoEMethod with DeepSeek's blocks."""
    block = {"block_quant": True, "use_mxfp8": False, "is_fp4_expert": False, "weight_block_size": [128, 128]}
    return SimpleNamespace(**(block | more))


def config(**more: Any) -> MoeRunnerConfig:
    return MoeRunnerConfig(**(SIZES | more))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was asked for flashinfer_cutlass, on a Hopper GPU."""
    flashinfer_fp8.register()
    monkeypatch.setattr(flashinfer_fp8, "get_moe_runner_backend", lambda: MoeRunnerBackend.FLASHINFER_CUTLASS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    runner = SimpleNamespace
    monkeypatch.setattr(flashinfer_fp8, "MoeRunner", lambda backend, _config: runner(runner_backend=backend))


def originals() -> tuple[list[Any], Any]:
    called: list[Any] = []
    return called, lambda *args: called.append(args)


def test_the_backend_is_known_to_sglang_after_it_was_registered_twice() -> None:
    flashinfer_fp8.register()
    flashinfer_fp8.register()
    backend = resolve_moe_runner_backend(FLASHINFER_FP8)
    assert backend.value == FLASHINFER_FP8
    assert not backend.is_flashinfer_cutlass()
    assert not backend.is_triton()


@pytest.mark.usefixtures("hopper")
def test_block_fp8_takes_flashinfer() -> None:
    called, original = originals()
    fp8 = method()
    flashinfer_fp8.create_runner(original, fp8, None, config())
    assert called == []
    assert flashinfer_fp8.runs_here(fp8)


@pytest.mark.parametrize(
    ("changed", "settings", "reason"),
    [
        ({"block_quant": False}, {}, "not block-FP8"),
        ({"use_mxfp8": True}, {}, "not block-FP8"),
        ({"weight_block_size": [64, 128]}, {}, r"blocks are \[64, 128\]"),
        ({}, {"intermediate_size_per_partition": 192}, "sizes are not multiples of 128"),
        ({}, {"activation": "gelu"}, "activation is gelu"),
        ({}, {"swiglu_limit": 7.0}, "it uses swiglu_limit"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_other_layers_stay_with_sglang(
    changed: dict[str, Any], settings: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    called, original = originals()
    fp8 = method(**changed)
    flashinfer_fp8.create_runner(original, fp8, None, config(**settings))
    assert len(called) == 1
    assert not flashinfer_fp8.runs_here(fp8)
    assert re.search(f"layer 3 runs .* on Triton, not on FlashInfer: .*{reason}", caplog.text)


@pytest.mark.usefixtures("hopper")
def test_another_backend_or_gpu_stays_with_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    called, original = originals()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    flashinfer_fp8.create_runner(original, method(), None, config())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flashinfer_fp8, "get_moe_runner_backend", lambda: MoeRunnerBackend.TRITON)
    flashinfer_fp8.create_runner(original, method(), None, config())
    assert len(called) == 2


def layer() -> SimpleNamespace:
    """Two experts, each value saying whether it belongs to the gate (1) or to the projection up (2)."""
    w13 = torch.ones(2, 256, 256)
    w13[:, 128:] = 2
    return SimpleNamespace(
        w13_weight=torch.nn.Parameter(w13.to(torch.float8_e4m3fn), requires_grad=False),
        w13_weight_scale_inv=torch.nn.Parameter(torch.tensor([[[1.0, 1.0], [2.0, 2.0]]] * 2), requires_grad=False),
        w2_weight=torch.nn.Parameter(torch.ones(2, 256, 128).to(torch.float8_e4m3fn), requires_grad=False),
        w2_weight_scale_inv=torch.nn.Parameter(torch.ones(2, 2, 1), requires_grad=False),
    )


@pytest.mark.usefixtures("hopper")
def test_weights_and_scales_are_put_in_flashinfers_order() -> None:
    fp8, moe = method(), layer()
    flashinfer_fp8.reorder(None, fp8, moe)  # it runs elsewhere
    assert moe.w13_weight[0, 0, 0].float() == 1
    flashinfer_fp8.create_runner(lambda *_args: None, fp8, None, config())
    flashinfer_fp8.reorder(None, fp8, moe)
    assert moe.w13_weight[:, :128].float().unique().tolist() == [2]
    assert moe.w13_weight_scale_inv[:, 0].unique().tolist() == [2]
    assert moe.w13_weight_scale_inv[:, 1].unique().tolist() == [1]
    flashinfer_fp8.restore_order(None, fp8, moe)  # before an update
    assert moe.w13_weight[:, :128].float().unique().tolist() == [1]
    assert moe.w13_weight_scale_inv[:, 0].unique().tolist() == [1]


def test_a_layer_runs_on_the_tensors_that_are_bound_now(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def kernel(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *tensors: Any, **_more: Any) -> Any:
        seen.append(tensors)
        return torch.ones_like(hidden)

    monkeypatch.setattr(flashinfer_fp8, "block_fp8_moe", kernel)
    monkeypatch.setattr(flashinfer_fp8.Workspace, "take", lambda *_args, **_kwargs: None)
    core = flashinfer_fp8.FlashInferBlockFp8Core(config())
    given = StandardDispatchOutput(
        torch.zeros(5, 256), None, StandardTopKOutput(torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.int64), None)
    )
    moe = layer()
    fp8 = SimpleNamespace(runner=SimpleNamespace(runner_backend=SimpleNamespace(value=FLASHINFER_FP8)))
    scaled = config(routed_scaling_factor=2.5)
    fp8.runner.run = lambda output, info: core.run_from_dispatch(output, info, scaled)
    result = flashinfer_fp8.apply(lambda *_args: None, fp8, moe, given)
    assert result.hidden_states.unique().tolist() == [2.5]
    moe.w13_weight = torch.nn.Parameter(torch.zeros(4, 256, 256).to(torch.float8_e4m3fn), requires_grad=False)
    flashinfer_fp8.apply(lambda *_args: None, fp8, moe, given)
    assert [tensors[0].shape[0] for tensors in seen] == [2, 4]


def test_other_methods_run_as_they_did() -> None:
    called, original = originals()
    triton = SimpleNamespace(runner=SimpleNamespace(runner_backend=MoeRunnerBackend.TRITON))
    flashinfer_fp8.apply(original, triton, "layer", "tokens")
    assert called == [(triton, "layer", "tokens")]
