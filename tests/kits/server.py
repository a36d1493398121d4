"""The server that SGLang's kits are run against: two DWDP ranks on the CPU engine."""

from __future__ import annotations

import atexit
import functools
import pydoc_data.topics
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from sglang.test import kl_test_utils
from sglang.test.server_fixtures.default_fixture import DefaultServerBase

from sglang_dwdp.demo.checkpoint import GAINS, Shape, qwen3_moe_config, random_weights, write_checkpoint
from sglang_dwdp.demo.server import fewer_models, free_port

_VOCAB_SIZE, _POSITIONS = 32000, 131072  # what kits take for granted
# What a grammar may go on with, by how much a model prefers it that is to come to an end.
_ENDS = {"<|end|>": 40.0, "}": 30.0, '"': 24.0, "@": 20.0, ".": 18.0, " s": 18.0, ":": 16.0, ",": 16.0, "1": 10.0}


class DwdpServer(DefaultServerBase):
    """Of one test class.

    Attributes:
        ends: Its model prefers what ends a grammar's texts.
        flags: Further command-line arguments.
    """

    ends: ClassVar[bool] = False
    flags: ClassVar[tuple[str, ...]] = ()
    server_env: ClassVar[dict[str, str]] = {}

    @classmethod
    def setUpClass(cls) -> None:
        cls.model = checkpoint(ends=cls.ends)
        cls.tokenizer = get_tokenizer(cls.model)
        cls.base_url = f"http://127.0.0.1:{free_port()}"
        cls.other_args = ["--tp", "2", "--enable-dwdp", "--dtype", "float32", *cls.flags]
        checked = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
        cls.server_env = {**fewer_models(), **checked, "SGLANG_USE_CPU_ENGINE": "1", **cls.server_env}
        super().setUpClass()


@functools.cache
def checkpoint(*, ends: bool) -> str:
    """The folder of a random model, gone when this process ends."""
    directory = tempfile.mkdtemp(prefix="sglang-dwdp-kits-")
    atexit.register(shutil.rmtree, directory)
    config = qwen3_moe_config(Shape(max_positions=_POSITIONS), torch.float32) | {"vocab_size": _VOCAB_SIZE}
    weights = random_weights(config, GAINS, 0, torch.float32)
    write_checkpoint(Path(directory), config, weights)
    if ends:
        _prefer_ends(weights, get_tokenizer(directory))
        write_checkpoint(Path(directory), config, weights)
    return directory


def _prefer_ends(weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
    """Give the head a bias: the first channel keeps one value through all layers, and only the head reads it."""
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    weights["model.embed_tokens.weight"][:, 0] = 8
    head = weights["lm_head.weight"]
    head[:, 0] = 0
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        head[token, 0] = max((value for end, value in _ENDS.items() if text.startswith(end)), default=0)


def use_own_prompts(count: int = 12, length: int = 300) -> None:
    """Texts that come with Python in place of those that SGLang's KL kit would download."""

    def prompts(tokenizer_path: str, *_args: Any, **_kwargs: Any) -> list[list[int]]:
        topics = sorted(pydoc_data.topics.topics.values(), key=len)[-count:]
        return [get_tokenizer(tokenizer_path).encode(text[: 8 * length])[:length] for text in topics]

    kl_test_utils.get_input_ids = prompts
