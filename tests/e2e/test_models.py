"""More model families: every rank gives the tokens of a single rank. Run by `make test-models`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_dwdp.demo.server import Server, ServerFailed
from tests.e2e.conftest import Running
from tests.e2e.test_parity import MLA_PLUGIN, Models, Reference, check
from tests.fixtures.families import Family

pytestmark = pytest.mark.models

# SGLang's plain attention for the CPU takes no sinks, so SGLang rejects gpt-oss with it. Here both the reference and
# DWDP leave the sinks out: what is compared is how experts are loaded and run.
NO_SINKS_PLUGIN = """
def register():
    from sglang.srt.arg_groups import model_hook
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    model_hook.attention_backends_of = lambda _view: ("triton", "triton")  # what SGLang thinks that it gets

    def without(original, *args, sinks=None, **kwargs):
        return original(*args, **kwargs)

    path = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend."
    for name in ("forward_extend", "forward_decode"):
        HookRegistry.register(path + name, without, HookType.AROUND)
"""
PLUGINS = {"kimi_k2": ("mla_on_cpu", MLA_PLUGIN), "gpt_oss": ("no_sinks", NO_SINKS_PLUGIN)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("family", ["glm4_moe", "kimi_k2", "gpt_oss", "minimax_m2"])
def test_parity(
    running: Running,
    models: Models,
    reference: Reference,
    plugin: Callable[[str, str], dict[str, str]],
    family: Family,
    ranks: int,
) -> None:
    how: Mapping[str, Any] = {"environment": plugin(*PLUGINS[family])} if family in PLUGINS else {}
    if family == "gpt_oss":  # SGLang's choice for it lays experts out in a way that its loader for the CPU does not
        how = {**how, "flags": ("--moe-runner-backend", "triton")}
    expected = reference(family, 8, **how)
    check(running, models(family, 8), ranks, expected, ("--dwdp-direct-max-tokens", "64"), **how)


def test_mixtral_is_unsupported(models: Models, tmp_path: Path) -> None:
    """SGLang's code for it has no attention data parallelism, with or without this plugin."""
    with Server(models("mixtral", 8), 2, tmp_path / "log", dwdp=()) as server, pytest.raises(ServerFailed):
        server.wait(240)
    log = server.log.read_text()
    assert "SGLang shards model.embed_tokens of MixtralForCausalLM over 2 ranks" in log
