"""--enable-mixed-chunk: decodes of one batch ride along in the prefill chunks of others, in one forward."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import Plugin, Reference, Running
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family

# Notes the prompt and the decode tokens of every mixed forward.
COUNTER = """
import os

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def note(_result, batch, running, *_args, **_kwargs):
        with open(os.environ["MIXED_FORWARDS"], "a") as file:
            file.write(f"{batch.extend_num_tokens} {len(running.reqs)}\\n")

    HookRegistry.register("sglang.srt.managers.schedule_batch.ScheduleBatch.mix_with_running", note, HookType.AFTER)
"""


@pytest.mark.serving
def test_mixed_chunks_give_the_same_tokens(
    running: Running,
    models: Callable[[Family, int], Path],
    reference: Reference,
    plugin: Plugin,
    tmp_path: Path,
) -> None:
    expected = reference("qwen3_moe", 9)
    mixed = tmp_path / "mixed"
    how = {
        "flags": ("--enable-mixed-chunk", "--chunked-prefill-size", "96"),
        "environment": plugin("mixed_counter", COUNTER) | {"MIXED_FORWARDS": str(mixed)},
    }
    with running(models("qwen3_moe", 9), 2, dwdp=("--dwdp-direct-max-tokens", "32"), **how) as server:
        # Short and long prompts by turns, so that some decode while others are prefilled in chunks.
        numbers = [n for pair in zip(range(8), range(15, 7, -1), strict=True) for n in pair] * 2

        def ask(place: int) -> list[int]:
            return server.generate(PROMPTS[numbers[place]], MAX_NEW_TOKENS, place // 2 % 2)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(len(numbers))))
        assert answers == [expected[number] for number in numbers]
        for report in server.reports():
            assert min(report["direct_forwards"], report["staged_forwards"]) > 0
    forwards = [tuple(map(int, line.split())) for line in mixed.read_text().splitlines()]
    assert any(tokens > 32 and decodes for tokens, decodes in forwards), "none was mixed and staged"
