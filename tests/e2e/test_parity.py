"""Every rank of a DWDP server gives the very tokens of transformers' implementation, which holds all experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sglang_dwdp.demo.server import Server
from tests.e2e.conftest import Answers, Plugin, Reference, Running
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family

Models = Callable[[Family, int], Path]

MLA_PLUGIN = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def allow(*_args, **_kwargs):
        from sglang.srt.models.deepseek_common import attention_backend_handler as handler
        handler.AttentionBackendRegistry.register("torch_native", handler._dispatch_mla_subtype)

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", allow, HookType.BEFORE)
"""


def compare(server: Server, ranks: int, expected: Answers) -> None:
    """Every rank gives the expected tokens for all prompts."""
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        # All ranks at the same time, which saves time: they share nothing but the experts.
        with ThreadPoolExecutor(ranks) as pool:
            answers = list(pool.map(partial(server.generate, prompt, MAX_NEW_TOKENS), range(ranks)))
        assert answers == [tokens] * ranks, prompt[:60]


def check(running: Running, model: Path, ranks: int, expected: Answers, dwdp: tuple[str, ...], **how: Any) -> None:
    """Parity with the view chosen by the size of the forward."""
    with running(model, ranks, dwdp=dwdp, **how) as server:
        compare(server, ranks, expected)
        for report in server.reports():
            assert min(report[k] for k in ("bytes_copied", "direct_forwards", "staged_forwards")) > 0


def test_qwen2_moe_with_its_gated_shared_expert(running: Running, models: Models, reference: Reference) -> None:
    # SGLang's gate of the shared expert is a Triton kernel, which the CPU can only interpret.
    how: Mapping[str, Any] = {"environment": {"TRITON_INTERPRET": "1"}}
    expected = reference("qwen2_moe", 9)
    check(running, models("qwen2_moe", 9), 2, expected, ("--dwdp-direct-max-tokens", "64"), **how)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_deepseek_with_shared_experts_and_grouped_routing(
    running: Running, models: Models, reference: Reference, plugin: Plugin, family: Family
) -> None:
    # SGLang has latent attention on the CPU for AMX only; with torch_native it has to be told to use it.
    how: Mapping[str, Any] = {"environment": plugin("mla_on_cpu", MLA_PLUGIN)}
    expected = reference(family, 8)
    check(running, models(family, 8), 2, expected, ("--dwdp-direct-max-tokens", "64"), **how)
