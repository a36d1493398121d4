"""Which backend --moe-runner-backend auto stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.srt_patches import moe_backend

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("quantization", "config", "weights"),
    [
        (None, None, "bf16"),
        (None, BLOCKS, "block-FP8"),
        ("fp8", BLOCKS, "block-FP8"),
        ("fp8", None, None),  # quantised at load, with one scale for a tensor
        (None, {"quant_method": "fp8"}, None),
        (None, {"quant_method": "mxfp4"}, "MXFP4"),
        (None, {"quant_method": "awq"}, None),
    ],
)
def test_the_format_of_the_experts(
    quantization: str | None, config: dict[str, Any] | None, weights: str | None
) -> None:
    assert moe_backend.weights_of(quantization, config) == weights


@pytest.fixture
def gpt_oss(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Arguments of a server for gpt-oss on a Hopper GPU whose user did not name a backend."""
    described = SimpleNamespace(hf_config=SimpleNamespace(quantization_config={"quant_method": "mxfp4"}))
    monkeypatch.setattr(moe_backend, "model_config_of", lambda _args: described)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(moe_backend.flashinfer_modules, "ready", lambda _format: True)
    return SimpleNamespace(device="cuda", moe_runner_backend="auto", quantization=None)


def test_auto_becomes_a_backend_and_the_log_says_why(
    gpt_oss: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert moe_backend.choose(gpt_oss, gpt_oss) == "flashinfer_mxfp4"
    assert "auto is flashinfer_mxfp4 for MXFP4 experts: SGLang's own choice" in caplog.text
    monkeypatch.setattr(moe_backend.flashinfer_modules, "ready", lambda _format: False)
    with caplog.at_level("INFO"):
        assert moe_backend.choose(gpt_oss, gpt_oss) == "triton"
    assert "kernels/build.py --format mxfp4" in caplog.text


def test_gpt_oss_in_bf16_gets_a_backend_that_reads_shared_experts(
    gpt_oss: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = SimpleNamespace(hf_config=SimpleNamespace(architectures=["GptOssForCausalLM"]))
    monkeypatch.setattr(moe_backend, "model_config_of", lambda _args: described)
    assert moe_backend.choose(gpt_oss, gpt_oss) == "triton"
    described.hf_config.architectures = ["Qwen3MoeForCausalLM"]
    assert moe_backend.choose(gpt_oss, gpt_oss) is None


def test_what_the_user_named_stays(gpt_oss: SimpleNamespace) -> None:
    gpt_oss.moe_runner_backend = "triton"
    assert moe_backend.choose(gpt_oss, gpt_oss) is None


def test_other_devices_and_gpus_are_left_alone(gpt_oss: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert moe_backend.choose(gpt_oss, gpt_oss) is None
    gpt_oss.device = "cpu"
    assert moe_backend.choose(gpt_oss, gpt_oss) is None
