"""Model shapes: parameter counts against the published ones, and clear errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.cost import Group
from sglang_dwdp.planner.formats import FORMATS, default_precision
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.memory import memory
from sglang_dwdp.planner.models import BUILTIN_CONFIGS, load_model, model_from_config


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-ai/DeepSeek-R1", 671),
        ("moonshotai/Kimi-K2-Instruct", 1026),
        ("Qwen/Qwen3-30B-A3B", 30.5),
        ("Qwen/Qwen3-235B-A22B", 235),
        ("openai/gpt-oss-20b", 20.9),
        ("openai/gpt-oss-120b", 116.8),
        ("zai-org/GLM-4.5", 355),
        ("mistralai/Mixtral-8x7B", 46.7),
        ("mistralai/Mixtral-8x22B", 140.6),
    ],
)
def test_parameters_match_the_published_count(name: str, billions: float) -> None:
    found = memory(load_model(name), get_gpu("H100"), default_precision(FORMATS["bf16"]), "replica", Group(1), 0)
    assert (found.attention + found.experts) / 2e9 == pytest.approx(billions, rel=0.02)


def test_deepseek_expert_bytes_are_those_of_the_paper() -> None:
    model = load_model("deepseek-r1")
    assert model.moe_layers == 58
    assert model.expert_params == 44_040_192


def test_every_name_leads_to_a_model() -> None:
    for name in BUILTIN_CONFIGS:
        assert load_model(name).experts > load_model(name).top_k


def test_a_config_file_and_its_directory_read_alike(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BUILTIN_CONFIGS["gpt-oss-20b"]))
    from_dir = load_model(str(folder))
    assert from_dir == load_model(str(folder / "config.json"))
    assert from_dir.window_layers == 12
    assert from_dir.expert_format == "mxfp4"


def test_nested_text_config_and_dense_layers() -> None:
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    }
    model = model_from_config({"text_config": text}, "nested")
    # layers 0, 2, 4 by the step, layer 1 by the list
    assert model.dense_layers == 4
    assert model.expert_format == "bf16"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PlannerError, match="qwen3-30b-a3b"):
        load_model("no-such-model")


def test_a_dense_model_is_reported() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(PlannerError, match="mixture-of-experts"):
        model_from_config(config, "dense")


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "not valid JSON"), (b"[]", "must hold a mapping, not list"), (b"\xf2\x00", "not valid JSON")],
)
def test_files_that_are_no_config_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(PlannerError, match=message):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size: .*, not 'wide'"),
        ({"hidden_size": 0}, "hidden_size: .* greater than or equal to 1, not 0"),
        ({"hidden_size": 2048.5}, "hidden_size: .*, not 2048.5"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: .* 10000"),
        ({"num_experts": True}, "num_experts: .* 2"),
        ({"num_experts": 4}, "8 of 4 experts"),
        ({"quantization_config": [1]}, "quantization_config: .* dictionary"),
        ({"quantization_config": {"config_groups": [1]}}, "cannot be understood"),
        ({"text_config": 3}, "text_config must be a mapping"),
        ({"mlp_only_layers": list(range(48))}, "48 of 48 layers dense"),
        ({"mlp_only_layers": ["first"]}, "mlp_only_layers.0: .*'first'"),
    ],
)
def test_configs_that_make_no_sense_are_reported_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlannerError, match=f"^the config of m:? .*{message}[^\n]*$"):
        model_from_config(BUILTIN_CONFIGS["qwen3-30b-a3b"] | change, "m")


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({"mlp_layer_types": ["dense", "dense"] + ["sparse"] * 46}, 2),
        ({"moe_layer_freq": [0] + [1] * 47}, 1),
        ({"moe_layer_freq": 1}, 0),
        ({"first_k_dense_replace": 3}, 3),
        ({"mlp_only_layers": [0, 99]}, 1),
    ],
)
def test_dense_layers_by_the_names_in_use(change: dict[str, Any], dense: int) -> None:
    assert model_from_config(BUILTIN_CONFIGS["qwen3-30b-a3b"] | change, "m").dense_layers == dense


def test_a_file_of_another_name_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(BUILTIN_CONFIGS["mixtral-8x7b"]))
    assert load_model(str(tmp_path / "other.json")).name == "other"


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
            },
            "int4",
        ),
        ({"quant_method": "w8a8_int8"}, "w8a8_int8"),
        ({"quant_method": "gptq", "bits": 8}, "gptq"),
        (None, "bf16"),
    ],
)
def test_expert_format_is_read_from_the_config(quantization: dict[str, Any] | None, expected: str) -> None:
    config = {**BUILTIN_CONFIGS["qwen3-30b-a3b"], "quantization_config": quantization}
    model = model_from_config(config, "m")
    assert model.expert_format == expected
    nested = {"text_config": BUILTIN_CONFIGS["qwen3-30b-a3b"], "quantization_config": quantization}
    assert model_from_config(nested, "m") == model
