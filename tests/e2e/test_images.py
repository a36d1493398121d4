"""Prompts with images: every rank runs the vision tower for its own requests, and gives the tokens of transformers. Run
by `make test-models`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from sglang_dwdp.demo.server import Server, ServerFailed
from tests.e2e.conftest import Plugin, Running
from tests.e2e.prompts import PROMPTS
from tests.fixtures import vision
from tests.fixtures.model_modules import FEWER_MODELS

pytestmark = pytest.mark.models
NEW_TOKENS = 8
# A vision tower whose ranks would wait for each other.
REDUCER = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def reduced(output, *_args, **_kwargs):
        from sglang.srt.distributed import tensor_model_parallel_all_reduce
        return tensor_model_parallel_all_reduce(output)

    HookRegistry.register("sglang.srt.models.qwen3_vl.Qwen3VLMoeVisionModel.forward", reduced, HookType.AFTER)
"""
FIRST, SECOND, THIRD = vision.image(1, 96, 64), vision.image(2, 128, 96), vision.image(3, 64, 160)
# The same text with other images, two images in both orders, and none.
ASKED: Sequence[tuple[str, Sequence[Image.Image]]] = (
    ("What is in IMAGE this picture?", [FIRST]),
    ("What is in IMAGE this picture?", [SECOND]),
    (PROMPTS[3], []),
    ("Compare IMAGE with IMAGE and", [SECOND, THIRD]),
    ("Compare IMAGE with IMAGE and", [THIRD, SECOND]),
    (f"{PROMPTS[11]} IMAGE {PROMPTS[10]}", [THIRD]),
)


def ask(server: Server, asked: tuple[str, Sequence[Image.Image]], rank: int) -> list[int]:
    text, images = asked
    body: dict[str, Any] = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
    body |= {"image_data": [vision.as_url(image) for image in images]} if images else {}
    tokens: list[int] = server.post("/generate", body | {"routed_dp_rank": rank})["output_ids"]
    return tokens


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("family", get_args(vision.VisionFamily))
def test_parity(running: Running, plugin: Plugin, tmp_path: Path, family: vision.VisionFamily, ranks: int) -> None:
    vision.make_checkpoint(tmp_path, family, num_experts=8)
    asked = [(text.replace("IMAGE", vision.image_text(family)), images) for text, images in ASKED]
    expected = vision.greedy_tokens(tmp_path, asked, NEW_TOKENS)
    assert len({tuple(tokens) for tokens in expected}) == len(asked), "images that change nothing compare nothing"
    environment = plugin("vision_on_cpu", vision.PROCESSOR_PLUGIN)
    with running(tmp_path, ranks, dwdp=("--dwdp-direct-max-tokens", "16"), environment=environment) as server:
        for first in range(len(asked)):
            # Another prompt on each rank at the same time, so that no rank sees the images of another.
            numbers = [(first + rank) % len(asked) for rank in range(ranks)]
            with ThreadPoolExecutor(ranks) as pool:
                answers = list(pool.map(ask, [server] * ranks, [asked[n] for n in numbers], range(ranks)))
            assert answers == [expected[n] for n in numbers], first
        for report in server.reports():
            assert min(report[k] for k in ("bytes_copied", "direct_forwards", "staged_forwards")) > 0


def test_a_vision_tower_with_a_collective_ends_the_server(plugin: Plugin, tmp_path: Path) -> None:
    """In SGLang's warm-up, which has an image, since the first forward has none."""
    model = tmp_path / "model"
    vision.make_checkpoint(model, "qwen3_vl_moe", num_experts=8)
    environment = plugin("reducer", REDUCER, plugin("vision_on_cpu", vision.PROCESSOR_PLUGIN))
    server = Server(model, 2, tmp_path / "log", dwdp=(), environment=FEWER_MODELS | environment)
    try:
        with pytest.raises(ServerFailed, match="the server ended with exit code"):
            server.wait()
    finally:
        server.kill()
    assert "DwdpRuntimeError: all_reduce over 2 ranks was called in a forward" in server.log.read_text()
