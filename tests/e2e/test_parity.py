"""Every rank of a DWDP server gives the very tokens of a single rank that holds all experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sglang_dwdp.demo.server import Server
from sglang_dwdp.experts.direct_limit import direct_limit
from tests.e2e.conftest import Answers, Running
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family

Models = Callable[[Family, int], Path]
Reference = Callable[..., Answers]

MLA_PLUGIN = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def allow(*_args, **_kwargs):
        from sglang.srt.models.deepseek_common import attention_backend_handler as handler
        handler.AttentionBackendRegistry.register("torch_native", handler._dispatch_mla_subtype)

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", allow, HookType.BEFORE)
"""


# Lets one server run all forwards staged and then all direct: starting a server takes longer than the prompts.
VIEW_SWITCH = """
import dataclasses
import os

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def switch(*_args, **_kwargs):
        from sglang_dwdp.srt_patches.forward import current_runtime
        with open(os.environ["VIEW_FILE"]) as file:
            view = file.read()
        runtime = current_runtime()
        if runtime.config.view != view:
            runtime.config = dataclasses.replace(runtime.config, view=view)
            runtime._views = runtime.config.views()

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", switch, HookType.BEFORE)
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


@pytest.mark.parametrize("ranks", [2, 3])
def test_qwen3_moe_staged_and_direct(
    running: Running,
    models: Models,
    reference: Reference,
    plugin: Callable[[str, str], dict[str, str]],
    tmp_path: Path,
    ranks: int,
) -> None:
    """8 experts divide evenly among 2 ranks, not among 3. test_package.py runs the demo with 9 on 2."""
    expected = reference("qwen3_moe", 8)
    view = tmp_path / "view"
    view.write_text("staged")
    environment = plugin("view_switch", VIEW_SWITCH) | {"VIEW_FILE": str(view)}
    with running(models("qwen3_moe", 8), ranks, dwdp=(), environment=environment) as server:
        compare(server, ranks, expected)
        staged = server.reports()
        for report in staged:
            assert report["direct_forwards"] == 0
            assert report["bytes_copied"] > 0
            assert report["direct_max_tokens"] == direct_limit(8, 2)
        limit = f"in place in forwards of up to {direct_limit(8, 2)} tokens"
        assert server.log.read_text(errors="replace").count(limit) == ranks
        view.write_text("direct")
        compare(server, ranks, expected)
        for before, after in zip(staged, server.reports(), strict=True):
            assert after["staged_forwards"] == before["staged_forwards"]
            assert after["direct_forwards"] > 0
            assert after["bytes_read_in_place"] > 0


def test_two_groups_with_redundant_experts(running: Running, models: Models, reference: Reference) -> None:
    """4 ranks: two share one set of 8 experts, and two another; each keeps 6 of them."""
    dwdp = ("--dwdp-group-size", "2", "--dwdp-local-experts", "6", "--dwdp-direct-max-tokens", "64")
    check(running, models("qwen3_moe", 8), 4, reference("qwen3_moe", 8), dwdp)


def test_qwen2_moe_with_its_gated_shared_expert(running: Running, models: Models, reference: Reference) -> None:
    # SGLang's gate of the shared expert is a Triton kernel, which the CPU can only interpret.
    how: Mapping[str, Any] = {"environment": {"TRITON_INTERPRET": "1"}}
    expected = reference("qwen2_moe", 9, **how)
    check(running, models("qwen2_moe", 9), 2, expected, ("--dwdp-direct-max-tokens", "64"), **how)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_deepseek_with_shared_experts_and_grouped_routing(
    running: Running, models: Models, reference: Reference, plugin: Callable[[str, str], dict[str, str]], family: Family
) -> None:
    # SGLang has latent attention on the CPU for AMX only; with torch_native it has to be told to use it.
    how: Mapping[str, Any] = {"environment": plugin("mla_on_cpu", MLA_PLUGIN)}
    expected = reference(family, 8, **how)
    check(running, models(family, 8), 2, expected, ("--dwdp-direct-max-tokens", "64"), **how)
