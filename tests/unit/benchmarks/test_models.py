"""The config.json files of benchmarks/models: Qwen3-30B-A3B's sizes, in formats that DWDP shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks import checkpoints
from sglang_dwdp.support.quantization import check_quantization

MODELS = Path(checkpoints.__file__).parent / "models"
SIZES = ("hidden_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts_per_tok", "max_position_embeddings")


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mtp"])
def test_sizes_are_those_of_the_bf16_model(name: str, tmp_path: Path) -> None:
    bf16 = AutoConfig.from_pretrained(checkpoints.qwen3(None, None, small=False, dummy=True, folder=tmp_path))
    config = AutoConfig.from_pretrained(MODELS / name)
    for key in (*SIZES, *COUNTS):
        assert getattr(config, key) == getattr(bf16, key), key
    assert config.rope_parameters["rope_theta"] == bf16.rope_parameters["rope_theta"]


@pytest.mark.parametrize(("name", "method"), [("int4", "compressed-tensors"), ("nvfp4", "modelopt_fp4")])
def test_dwdp_shares_their_formats(name: str, method: str) -> None:
    config = AutoConfig.from_pretrained(MODELS / name).quantization_config
    assert config
    check_quantization(method, config)  # does not raise


def test_a_draft_layer_comes_after_the_others() -> None:
    config = AutoConfig.from_pretrained(MODELS / "mtp")
    assert (config.num_nextn_predict_layers, config.first_k_dense_replace) == (1, 1)
