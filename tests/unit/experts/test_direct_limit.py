"""The limit of direct views: planned where GPU and model are known, a constant with the reason elsewhere."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_dwdp.config import UNPLANNED_DIRECT_MAX_TOKENS
from sglang_dwdp.experts.direct_limit import plan_direct_limit
from sglang_dwdp.planner.builtin_models import BUILTIN_CONFIGS
from sglang_dwdp.planner.direct import direct_max_tokens
from sglang_dwdp.planner.gpus import GPUS, get_gpu, gpu_of_device
from sglang_dwdp.planner.models import load_model

H100 = "NVIDIA H100 80GB HBM3"
QWEN = BUILTIN_CONFIGS["qwen3-30b-a3b"]
OTHER_KEYS = ("text_config", "mlp_only_layers", "moe_layer_freq", "mlp_layer_types", "decoder_sparse_step", "head_dim")


def test_it_is_the_planners() -> None:
    limit = plan_direct_limit(QWEN, "qwen", H100, 4)
    assert limit.tokens == direct_max_tokens(load_model("qwen3-30b-a3b"), get_gpu("H100"), 4)
    assert limit.tokens != UNPLANNED_DIRECT_MAX_TOKENS
    assert limit.why == "planned for 32 of 128 bf16 experts on each of 4 H100"


def test_what_changes_the_traffic_changes_it() -> None:
    plain = plan_direct_limit(QWEN, "qwen", H100, 4)
    for other in (
        plan_direct_limit(BUILTIN_CONFIGS["deepseek-v3"], "r1", H100, 4),
        plan_direct_limit({**QWEN, "num_experts_per_tok": 2}, "qwen", H100, 4),
    ):
        assert other.tokens != plain.tokens
    assert "fp8 experts" in plan_direct_limit(QWEN, "qwen", H100, 4, quantization="fp8").why
    assert "48 of 128" in plan_direct_limit(QWEN, "qwen", H100, 4, local_experts=48).why
    assert "43 of 128" in plan_direct_limit(QWEN, "qwen", H100, 3).why


@pytest.mark.parametrize(
    ("config", "device", "quantization", "reason"),
    [
        (QWEN, None, None, "knows GPUs only"),
        (QWEN, "NVIDIA A100-SXM4-80GB", None, "does not know the GPU 'NVIDIA A100-SXM4-80GB'"),
        ({"hidden_size": 64}, H100, None, "the model config has none of num_hidden_layers"),
        ({**QWEN, "hidden_size": "wide"}, H100, None, "hidden_size 'wide': not a whole number"),
        ({**QWEN, "num_attention_heads": 0, "head_dim": None}, H100, None, "num_attention_heads 0: must be 1 to"),
        ({**QWEN, "layer_types": 3}, H100, None, "(TypeError"),
        ({**QWEN, "quantization_config": [1]}, H100, None, "(AttributeError"),
        (QWEN, H100, "w8a8_int8", "unknown weight format 'w8a8_int8'"),
        (BUILTIN_CONFIGS["deepseek-v3"] | {"n_routed_experts": 0}, H100, None, "n_routed_experts 0: must be 1 to"),
        ({**QWEN, "num_experts": 4}, H100, None, "8 of 4 experts per token"),
    ],
)
def test_what_it_rests_on_where_the_planner_cannot_say(
    config: dict[str, Any], device: str | None, quantization: str | None, reason: str
) -> None:
    limit = plan_direct_limit(config, "m", device, 4, quantization=quantization)
    assert limit.tokens == UNPLANNED_DIRECT_MAX_TOKENS
    assert limit.why.startswith("a constant, since")
    assert reason in limit.why


nonsense = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(BUILTIN_CONFIGS)), st.data())
def test_no_config_can_stop_a_server(name: str, data: st.DataObject) -> None:
    config: dict[str, Any] = dict(BUILTIN_CONFIGS[name])
    for key in data.draw(st.lists(st.sampled_from(sorted({*config, *OTHER_KEYS})), min_size=1, max_size=3)):
        config[key] = data.draw(nonsense)
    assert plan_direct_limit(config, name, H100, 4).tokens >= 0


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        (H100, "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("AMD Instinct MI355X", "MI355X"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB300", None),
        ("NVIDIA H20", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX PRO 6000", None),
    ],
)
def test_devices_by_the_drivers_names(device: str, gpu: str | None) -> None:
    found = gpu_of_device(device)
    assert (found.name if found else None) == gpu
    assert found is None or found in GPUS.values()
