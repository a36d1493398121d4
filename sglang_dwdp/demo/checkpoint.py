"""Small random Qwen3-MoE checkpoints, with a real tokenizer, that load like any other and need no download.

The weights are random, but scaled so that greedy decoding depends on the prompt, on attention and on the experts
that were chosen: an expert that is read wrongly changes the text.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pydoc_data.topics
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import ByteLevelBPETokenizer

VOCAB_SIZE = 2048
NUM_FILES = 4
SPECIAL_TOKENS = ("<|end|>", "<|begin|>", "<|pad|>", "<|user|>", "<|assistant|>")  # in the order of their ids, from 0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# By the end of a tensor's name, what its random values are scaled by: about 1 keeps what a layer puts out as large as
# what it reads. Attention and experts get more, so that they weigh as much as the token's own embedding; the router
# gets more, so that its choices are clear. The first entry that fits counts.
GAINS: Mapping[str, float] = {
    "lm_head.weight": 4.0,
    "q_norm.weight": 1.5,
    "k_norm.weight": 1.5,
    "norm.weight": 1.0,
    "embed_tokens.weight": 1.0,
    "gate.weight": 2.0,
    "o_proj.weight": 2.0,
    "down_proj.weight": 2.0,
    "": 1.5,
}
_EMBEDDINGS = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "backbone.embeddings.weight")


@dataclass(frozen=True)
class Shape:
    """The sizes of a checkpoint; every field can be given to `make_checkpoint`.

    By default an expert's bytes are no multiple of 4 KiB pages, neither in bfloat16 nor in float32, so that
    neighbouring ranks share pages; its rows are multiples of 16 bytes, as grouped matrix products want.
    """

    num_experts: int = 8
    num_layers: int = 4
    hidden_size: int = 96
    moe_intermediate_size: int = 88
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    top_k: int = 2
    max_positions: int = 4096

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} is not between 1 and num_experts={self.num_experts}")


def make_checkpoint(directory: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **shape: int) -> None:
    """Write a Qwen3-MoE checkpoint: config.json, a tokenizer, and safetensors files with their index.

    The same arguments give the same bytes. A tensor depends on the seed, its name and its size only, so checkpoints
    that differ in one setting share the rest.

    Args:
        directory: made if it is not there.
        seed: of the random weights.
        dtype: of the weights.
        **shape: fields of `Shape`.

    Raises:
        ValueError: the shape cannot work.
    """
    config = qwen3_moe_config(Shape(**shape), dtype)
    write_checkpoint(Path(directory), config, random_weights(config, GAINS, seed, dtype))


def qwen3_moe_config(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a Qwen3-MoE model without dense layers, with which SGLang's CPU engine gives wrong tokens."""
    return {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden_size,
        "intermediate_size": 2 * shape.hidden_size,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "num_experts_per_tok": shape.top_k,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "pad_token_id": 2,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": shape.head_dim,
        "norm_topk_prob": True,
        "num_experts": shape.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def random_weights(
    config: Mapping[str, Any],
    gains: Mapping[str, float],
    seed: int,
    dtype: torch.dtype,
    auto_class: str = "AutoModelForCausalLM",
) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the name that it has in released ones.

    Args:
        config: of the model, as in config.json; its `model_type` must be known to transformers.
        gains: scales of the weights, by the end of their names.
        seed: of the random numbers.
        dtype: of the tensors.
        auto_class: transformers' name of the class that knows the model.

    Returns:
        Tensors as of `random_tensors`.
    """
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    known = transformers.AutoConfig.for_model(**copy.deepcopy(dict(config)))  # which changes what is nested in it
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(known)
    # transformers keeps all experts of a layer in one tensor, and released checkpoints mostly do not.
    empty = revert_weight_conversion(model, model.state_dict())
    return random_tensors({name: tuple(tensor.shape) for name, tensor in empty.items()}, gains, seed, dtype)


def random_tensors(
    sizes: Mapping[str, tuple[int, ...]], gains: Mapping[str, float], seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random tensors of a checkpoint.

    A matrix has the standard deviation gain/sqrt(inputs), a norm is scattered around its gain, and embeddings and
    biases have the standard deviation `gain`.

    Args:
        sizes: of the tensors, by name.
        gains: scales of the weights, by the end of their names.
        seed: of the random numbers.
        dtype: of the tensors.
    """

    def draw(name: str) -> torch.Tensor:
        gain = next(gain for end, gain in gains.items() if name.endswith(end))
        size = sizes[name]
        noise = torch.randn(size, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode())))
        # Some models number their norms.
        if name.endswith("norm.weight") or (name.endswith("weight") and len(size) == 1):
            return (gain * (1 + 0.1 * noise)).to(dtype)
        inputs = 1 if name in _EMBEDDINGS or name.endswith("bias") or len(size) == 1 else size[1]
        is_float32 = name.endswith("e_score_correction_bias")  # in every released DeepSeek checkpoint
        return (noise * (gain / math.sqrt(inputs))).to(torch.float32 if is_float32 else dtype)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # one tensor's numbers are drawn by one core
        return dict(zip(sizes, pool.map(draw, sizes), strict=True))


def write_checkpoint(directory: Path, config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint of any model.

    Args:
        directory: made if it is not there.
        config: of the model, as in config.json.
        weights: by name; they go to `NUM_FILES` files of about equal size, or a few more.
    """
    make_tokenizer(directory, config.get("max_position_embeddings", 4096))
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 0})
    file_bytes = sum(tensor.nbytes for tensor in weights.values()) // NUM_FILES
    save_torch_state_dict(weights, directory, max_shard_size=file_bytes)


def make_tokenizer(directory: Path, max_tokens: int = 4096) -> None:
    """Train a byte-level BPE tokenizer on the language reference that ships with Python.

    Byte-level, so that any text survives a round trip. The same Python gives the same tokenizer.

    Args:
        directory: where tokenizer.json and tokenizer_config.json are written; made if it is not there.
        max_tokens: what the configuration says is the longest input.
    """
    directory.mkdir(parents=True, exist_ok=True)
    topics: Mapping[str, str] = pydoc_data.topics.topics
    texts = (topics[name] for name in sorted(topics))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, VOCAB_SIZE, 0, show_progress=False, special_tokens=list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("eos_token", "bos_token", "pad_token"), SPECIAL_TOKENS, strict=False)),
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
