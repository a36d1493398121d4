import json
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("torch")
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from sglang_dwdp.demo.checkpoint import NUM_FILES, VOCAB_SIZE, make_tokenizer
from tests.fixtures.families import Family, Shape, make_checkpoint
from tests.fixtures.family_shapes import TWINS

FAMILIES = get_args(Family)
DENSE_FIRST = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "kimi_k2",
    "glm4_moe",
    "glm_moe_dsa",
    "ernie4_5_moe",
    "glm4_moe_lite",
    "exaone_moe",
    "mimo_v2_flash",
    "cohere2_moe",
    "laguna",
    *TWINS,
)
NAMED_OTHERWISE = (
    "mixtral",
    "minimax_m2",
    "gpt_oss",
    "llama4",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "phimoe",
    "lfm2_moe",
    "longcat_flash",
    "hy_v3",
    "granitemoe_swa",
    "granitemoehybrid",
    "nemotron_h",
    "kimi_linear",
    "step3p5",
)
NAMED_ALIKE = [family for family in FAMILIES if family not in NAMED_OTHERWISE]


def _config(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor, by way of the index, as a loader finds them."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(directory / file) for file in set(weight_map.values())}
    assert sum(len(tensors) for tensors in files.values()) == len(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x", "naïve – 日本語 🙂", "", "  two  spaces  "])
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_has_learnt_words(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert len(tokenizer("The for statement is used to iterate")["input_ids"]) < 12


def test_special_tokens(tokenizer: Any) -> None:
    assert [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    assert tokenizer("<|end|>")["input_ids"] == [0]


def test_the_chat_template_renders(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nHello<|end|>\n<|assistant|>\n"


def test_the_tokenizer_is_the_same_every_time(tmp_path: Path) -> None:
    for name in "ab":
        make_tokenizer(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


# Kimi K2's type comes with its own checkpoint; SGLang knows it. So does that of those that are made from others.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("kimi_k2", *TWINS)])
def test_transformers_knows_every_family_and_its_tokenizer(family: Family, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, num_layers=2)
    assert AutoConfig.from_pretrained(tmp_path).model_type == family
    text = "import os\n\nprint(os.sep)"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded(text)["input_ids"]) == text


@pytest.mark.parametrize("family", NAMED_ALIKE)
@pytest.mark.parametrize("num_experts", [8, 9, 11])
def test_every_expert_of_every_layer_is_there(family: Family, num_experts: int, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, num_experts=num_experts, num_layers=3)
    tensors = _tensors(tmp_path)
    shape = Shape()
    dense = {0} if family in DENSE_FIRST else set()
    for layer in set(range(3)) - dense:
        prefix = f"model.layers.{layer}.mlp."
        assert tensors[prefix + "gate.weight"].shape == (num_experts, shape.hidden_size)
        for expert in range(num_experts):
            size = (shape.moe_intermediate_size, shape.hidden_size)
            assert tensors[f"{prefix}experts.{expert}.gate_proj.weight"].shape == size
            assert tensors[f"{prefix}experts.{expert}.up_proj.weight"].shape == size
            assert tensors[f"{prefix}experts.{expert}.down_proj.weight"].shape == size[::-1]
        assert f"{prefix}experts.{num_experts}.up_proj.weight" not in tensors
    for layer in dense:
        assert f"model.layers.{layer}.mlp.up_proj.weight" in tensors
        assert f"model.layers.{layer}.mlp.experts.0.up_proj.weight" not in tensors


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2"])
def test_experts_under_other_names(family: Family, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, num_experts=9, num_layers=2)
    tensors = _tensors(tmp_path)
    shape = Shape()
    size = (shape.moe_intermediate_size, shape.hidden_size)
    for expert in range(9):
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}."
        assert [tensors[f"{prefix}w{n}.weight"].shape for n in (1, 2, 3)] == [size, size[::-1], size]


def test_gpt_oss_has_all_experts_in_one_tensor(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss", num_experts=9, num_layers=2)
    tensors = _tensors(tmp_path)
    shape = Shape()
    experts = "model.layers.1.mlp.experts."
    assert tensors[experts + "gate_up_proj"].shape == (9, shape.hidden_size, 2 * shape.moe_intermediate_size)
    assert tensors[experts + "down_proj_bias"].shape == (9, shape.hidden_size)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("glm4_moe", "self_attn.q_norm.weight"),
        ("kimi_k2", "self_attn.q_b_proj.weight"),
        ("gpt_oss", "self_attn.sinks"),
        ("minimax_m2", "block_sparse_moe.e_score_correction_bias"),
        ("llama4", "feed_forward.shared_expert.down_proj.weight"),
        ("qwen3_moe", "self_attn.q_norm.weight"),
        ("qwen2_moe", "mlp.shared_expert_gate.weight"),
        ("qwen2_moe", "self_attn.q_proj.bias"),
        ("deepseek_v2", "mlp.shared_experts.down_proj.weight"),
        ("deepseek_v2", "self_attn.q_proj.weight"),
        ("deepseek_v3", "self_attn.q_b_proj.weight"),
        ("deepseek_v3", "mlp.gate.e_score_correction_bias"),
        ("glm4_moe_lite", "self_attn.q_b_proj.weight"),
        ("lfm2_moe", "feed_forward.expert_bias"),
        ("mimo_v2_flash", "self_attn.attention_sink_bias"),
        ("longcat_flash", "mlps.1.down_proj.weight"),
        ("hy_v3", "mlp.shared_mlp.down_proj.weight"),
        ("laguna", "self_attn.g_proj.weight"),
        ("bailing_moe_v2", "attention.query_key_value.bias"),
        ("sarvam_moe", "mlp.gate.expert_bias"),
        ("qwen3_next", "linear_attn.in_proj_ba.weight"),
        ("qwen3_5_moe_text", "linear_attn.in_proj_a.weight"),
        ("step3p5", "self_attn.g_proj.weight"),
    ],
)
def test_what_a_family_is_known_for(family: Family, name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, num_layers=2)
    assert f"model.layers.1.{name}" in _tensors(tmp_path)


def test_granite_4_with_states(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "granitemoehybrid", states=1)
    tensors = _tensors(tmp_path)
    for layer, name in enumerate(("mamba.A_log", "mamba.A_log", "mamba.A_log", "self_attn.q_proj.weight")):
        assert f"model.layers.{layer}.{name}" in tensors


def test_nemotron_h_has_layers_of_three_kinds(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "nemotron_h", num_experts=9, num_layers=3)
    tensors = _tensors(tmp_path)
    names = {0: "A_log", 1: "experts.8.up_proj.weight", 2: "A_log", 4: "q_proj.weight", 5: "gate.weight"}
    for layer, name in names.items():
        assert f"backbone.layers.{layer}.mixer.{name}" in tensors


def test_step_has_all_experts_in_one_tensor_and_other_heads_with_windows(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "step3p5", num_experts=9, num_layers=2)
    tensors, shape = _tensors(tmp_path), Shape()
    layer = "model.layers.1."
    assert tensors[layer + "moe.up_proj.weight"].shape == (9, shape.moe_intermediate_size, shape.hidden_size)
    heads = [len(tensors[f"model.layers.{number}.self_attn.g_proj.weight"]) for number in range(2)]
    assert heads == [shape.num_heads, shape.num_heads // 2]


@pytest.mark.parametrize(("num_experts", "groups"), [(8, 4), (9, 3), (10, 2), (11, 1), (2, 1)])
def test_groups_divide_the_experts_and_leave_enough_to_choose_from(num_experts: int, groups: int) -> None:
    assert Shape(num_experts=num_experts).expert_groups() == groups


def test_deepseek_v3_keeps_enough_groups_for_its_top_k(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", num_experts=9, num_layers=1)
    config = _config(tmp_path)
    assert config["topk_group"] * (9 // config["n_group"]) >= config["num_experts_per_tok"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_do_not_end_on_page_edges(dtype: torch.dtype) -> None:
    shape = Shape()
    assert shape.moe_intermediate_size * shape.hidden_size * dtype.itemsize % 4096 != 0
    assert 2 * shape.moe_intermediate_size * shape.hidden_size * dtype.itemsize % 4096 != 0


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_checkpoint(tmp_path / name, num_layers=1, seed=seed)
    a, b, c = (_tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_more_experts_leave_the_other_tensors_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a", num_layers=1, num_experts=4)
    make_checkpoint(tmp_path / "b", num_layers=1, num_experts=5)
    a, b = _tensors(tmp_path / "a"), _tensors(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a if not name.endswith("mlp.gate.weight"))


def test_several_files_and_the_dtype(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_layers=1, dtype=torch.float32)
    assert NUM_FILES <= len(list(tmp_path.glob("model-*.safetensors"))) <= 2 * NUM_FILES
    assert _config(tmp_path)["torch_dtype"] == "float32"
    assert all(tensor.dtype == torch.float32 for tensor in _tensors(tmp_path).values())


@pytest.mark.parametrize(
    ("arguments", "message"), [({"family": "gpt2"}, "unknown family 'gpt2'"), ({"top_k": 9}, "top_k=9")]
)
def test_what_makes_no_sense_is_an_error(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_checkpoint(tmp_path, **arguments)
