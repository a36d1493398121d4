"""Small random checkpoints, with a real tokenizer, that SGLang and transformers load like any other.

The demo and the end-to-end tests need Mixture-of-Experts models that start in seconds and need no
download. The weights are random, but scaled so that greedy decoding depends on the whole prompt,
on attention and on the experts that were chosen: an expert that is read wrongly changes the text.
"""

import json
import math
import os
import pydoc_data.topics
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sglang_dwdp.demo import quantized
from sglang_dwdp.demo.families import Family, Shape, TensorSpec, config, tensors

VOCAB_SIZE = 2048
EOS, BOS, PAD, USER, ASSISTANT = "<|end|>", "<|begin|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (EOS, BOS, PAD, USER, ASSISTANT)  # in the order of their ids, from 0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(directory: str | Path, max_tokens: int = 4096) -> None:
    """Trains a byte-level BPE tokenizer on the language reference that ships with Python.

    Byte-level, so that any text survives a round trip. The same Python gives the same tokenizer.
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


def make_checkpoint(
    directory: str | Path,
    family: Family = "qwen3_moe",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    num_files: int = 2,
    quantization: quantized.Quantization = "none",
    **shape: int,
) -> None:
    """Writes config.json, a tokenizer and `num_files` safetensors files with their index.

    `shape` sets fields of `Shape`. The same arguments give the same bytes; a tensor depends on the
    seed, its name and its size only, so two checkpoints that differ in one setting share the rest.
    With a `quantization`, `dtype` is that of what it leaves alone.
    """
    if family not in get_args(Family):
        raise ValueError(f"unknown family {family!r}: one of {', '.join(get_args(Family))}")
    directory = Path(directory)
    sizes = Shape(**shape)
    make_tokenizer(directory, sizes.max_positions)
    if not 1 <= sizes.top_k <= sizes.num_experts:
        raise ValueError(f"top_k={sizes.top_k} is not between 1 and num_experts={sizes.num_experts}")
    name = str(dtype).removeprefix("torch.")
    described = config(family, sizes, name, VOCAB_SIZE) | quantized.config(quantization, sizes.num_layers)
    _write_json(directory / "config.json", described)
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 0})

    specs = list(tensors(family, sizes, VOCAB_SIZE))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # one tensor's numbers are drawn by one core
        drawn = pool.map(lambda spec: _draw(spec, seed, dtype), specs)
        weights = {spec[0]: tensor for spec, tensor in zip(specs, drawn, strict=True)}
    _write_weights(directory, quantized.quantize(weights, quantization), num_files)


def _draw(spec: TensorSpec, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix has the standard deviation gain/sqrt(inputs), a norm is scattered around its gain,
    and a bias has the standard deviation `gain`.
    """
    name, size, gain = spec
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    noise = torch.randn(size, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return noise * gain  # float32 in every released DeepSeek checkpoint
    if name.endswith("norm.weight"):
        return (gain * (1 + 0.1 * noise)).to(dtype)
    if name.endswith(("bias", "sinks")):
        return (noise * gain).to(dtype)
    fan_in = 1 if name == "model.embed_tokens.weight" else size[1]
    return (noise * (gain / math.sqrt(fan_in))).to(dtype)


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
