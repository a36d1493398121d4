"""Small random Qwen3-MoE checkpoints, with a real tokenizer, that load like any other and need no download.

The weights are random, but scaled so that greedy decoding depends on the prompt, on attention and on the experts
that were chosen: an expert that is read wrongly changes the text.
"""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048
EOS, BOS, PAD, USER, ASSISTANT = "<|end|>", "<|begin|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (EOS, BOS, PAD, USER, ASSISTANT)  # in the order of their ids, from 0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


# By the end of a tensor's name, what its random values are scaled by: about 1 keeps what a layer puts out as large as
# what it reads. Attention and experts get more, so that they weigh as much as the token's own embedding; the router
# gets more, so that its choices are clear. The first entry that fits counts.
GAINS: Mapping[str, float] = {
    "lm_head.weight": 4.0,
    "bias": 0.2,
    "sinks": 1.0,
    "q_norm.weight": 1.5,
    "k_norm.weight": 1.5,
    "norm.weight": 1.0,
    "embed_tokens.weight": 1.0,
    "shared_expert_gate.weight": 1.0,
    "gate.weight": 2.0,
    "router.weight": 2.0,
    "o_proj.weight": 2.0,
    "down_proj.weight": 2.0,
    "q_a_proj.weight": 1.0,
    "": 1.5,
}


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
        """Check the sizes.

        Raises:
            ValueError: more experts are chosen than there are.
        """
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} is not between 1 and num_experts={self.num_experts}")


def make_tokenizer(directory: str | Path, max_tokens: int = 4096) -> None:
    """Train a byte-level BPE tokenizer on the language reference that ships with Python.

    Byte-level, so that any text survives a round trip. The same Python gives the same tokenizer.

    Args:
        directory: where tokenizer.json and tokenizer_config.json are written.
        max_tokens: what the configuration says is the longest input.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    topics: Mapping[str, str] = pydoc_data.topics.topics
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "bos_token": BOS,
            "pad_token": PAD,
            "model_max_length": max_tokens,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def common_config(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says for every family."""
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
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "pad_token_id": 2,
    }


def qwen3_moe_config(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a Qwen3-MoE model without dense layers, with which SGLang's CPU engine gives wrong tokens."""
    return common_config(shape, dtype) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": shape.head_dim,
        "norm_topk_prob": True,
        "num_experts": shape.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def make_checkpoint(
    directory: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, num_files: int = 2, **shape: int
) -> None:
    """Write a Qwen3-MoE checkpoint: config.json, a tokenizer, and safetensors files with their index.

    The same arguments give the same bytes. A tensor depends on the seed, its name and its size only, so checkpoints
    that differ in one setting share the rest.

    Args:
        directory: made if it is not there.
        seed: of the random weights.
        dtype: of the weights.
        num_files: safetensors files.
        **shape: fields of `Shape`.

    Raises:
        ValueError: the shape cannot work.
    """
    sizes = Shape(**shape)
    write_checkpoint(Path(directory), qwen3_moe_config(sizes, dtype), seed=seed, dtype=dtype, num_files=num_files)


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    *,
    seed: int,
    dtype: torch.dtype,
    num_files: int,
    gains: Mapping[str, float] = GAINS,
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
    model_type: str | None = None,
) -> None:
    """Write a checkpoint of any model that transformers has a class for.

    Args:
        directory: made if it is not there.
        config: of the model, as in config.json.
        seed: of the random weights.
        dtype: of the weights.
        num_files: safetensors files.
        gains: scales of the weights, by the end of their names.
        convert: changes the weights before they are written, for example to a quantized format.
        model_type: what transformers calls a model with the same tensors, if it does not know the config's own.
    """
    make_tokenizer(directory, config.get("max_position_embeddings", 4096))
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 0})

    def draw(item: tuple[str, tuple[int, ...]]) -> torch.Tensor:
        gain = next(gain for end, gain in gains.items() if item[0].endswith(end))
        return _draw(*item, gain, seed, dtype)

    sizes = tensor_sizes(config | ({"model_type": model_type} if model_type else {}))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # one tensor's numbers are drawn by one core
        weights = dict(zip(sizes, pool.map(draw, sizes.items()), strict=True))
    _write_weights(directory, convert(weights), num_files)


def tensor_sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by the name that it has in released ones.

    Args:
        config: of the model, as in config.json; its `model_type` must be known to transformers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    known = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known)
    # transformers keeps all experts of a layer in one tensor, and released checkpoints mostly do not.
    weights = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _draw(name: str, size: tuple[int, ...], gain: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values: a matrix has the standard deviation gain/sqrt(inputs), a norm is scattered around its gain, and a
    bias has the standard deviation `gain`.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    noise = torch.randn(size, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return noise * gain  # float32 in every released DeepSeek checkpoint
    if name.endswith("norm.weight"):
        return (gain * (1 + 0.1 * noise)).to(dtype)
    if name.endswith(("bias", "sinks")):
        return (noise * gain).to(dtype)
    inputs = 1 if name == "model.embed_tokens.weight" else size[1]
    return (noise * (gain / math.sqrt(inputs))).to(dtype)


def _write_weights(directory: Path, weights: Mapping[str, torch.Tensor], num_files: int) -> None:
    names = list(weights)
    num_files = max(1, min(num_files, len(names)))
    weight_map: dict[str, str] = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = names[i * len(names) // num_files : (i + 1) * len(names) // num_files]
        save_file({name: weights[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
