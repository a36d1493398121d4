"""The limit of direct views, from SGLang's arguments and the driver's name of the GPU."""

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dwdp.config import UNPLANNED_DIRECT_MAX_TOKENS, DwdpConfig
from sglang_dwdp.planner.builtin_models import BUILTIN_CONFIGS
from sglang_dwdp.planner.direct import direct_max_tokens
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.srt_patches import planned


def _settle(monkeypatch: pytest.MonkeyPatch, config: DwdpConfig, device: str, name: str) -> tuple[DwdpConfig, str]:
    def device_name(index: int) -> str:
        assert index == 3
        return name

    hf_config = SimpleNamespace(to_dict=lambda: BUILTIN_CONFIGS["qwen3-30b-a3b"])
    monkeypatch.setattr(planned, "model_config_of", lambda _args: SimpleNamespace(hf_config=hf_config))
    monkeypatch.setattr(planned.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(planned.torch.cuda, "get_device_name", device_name)
    arguments: Any = SimpleNamespace(base_gpu_id=3, device=device, model_path="a/b", quantization=None)
    settled = planned.with_direct_limit(arguments, arguments, config, 4)
    return settled, planned.why_direct_limit(arguments)


def test_the_planner_chooses_on_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    settled, why = _settle(monkeypatch, DwdpConfig(depth=3), "cuda", "NVIDIA H200")
    expected = direct_max_tokens(load_model("qwen3-30b-a3b"), get_gpu("H200"), 4, depth=3)
    assert settled == DwdpConfig(depth=3, direct_max_tokens=expected)
    assert why == "planned for 32 of 128 bf16 experts on each of 4 H200"


def test_a_limit_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DwdpConfig(direct_max_tokens=0)
    assert _settle(monkeypatch, config, "cuda", "NVIDIA H200") == (config, "as given")


def test_elsewhere_it_is_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, name in (("cpu", "NVIDIA H200"), ("cuda", "NVIDIA A10")):
        settled, why = _settle(monkeypatch, DwdpConfig(), device, name)
        assert settled.direct_max_tokens == UNPLANNED_DIRECT_MAX_TOKENS
        assert why.startswith("a constant, since")
