"""More model families: every rank gives the tokens of a single rank. Run by `make test-models`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sglang_dwdp.demo.families import Family
from tests.e2e.conftest import Running
from tests.e2e.test_parity import MLA_PLUGIN, Models, Reference, check

pytestmark = pytest.mark.models

# SGLang's plain attention for the CPU takes no sinks, so both the reference and DWDP leave them out.
NO_SINKS_PLUGIN = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def without(original, *args, sinks=None, **kwargs):
        return original(*args, **kwargs)

    path = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend."
    for name in ("forward_extend", "forward_decode"):
        HookRegistry.register(path + name, without, HookType.AROUND)
"""
PLUGINS = {"kimi_k2": ("mla_on_cpu", MLA_PLUGIN), "gpt_oss": ("no_sinks", NO_SINKS_PLUGIN)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "kimi_k2", "gpt_oss", "minimax_m2"])
def test_parity(
    running: Running,
    models: Models,
    reference: Reference,
    plugin: Callable[[str, str], dict[str, str]],
    record_property: Callable[[str, object], None],
    family: Family,
    ranks: int,
) -> None:
    how: Mapping[str, Any] = {"environment": plugin(*PLUGINS[family])} if family in PLUGINS else {}
    expected = reference(family, 8, **how)
    check(running, models(family, 8), ranks, expected, ("--dwdp-direct-max-tokens", "64"), **how)
    record_property("support", f"{family}|float32|native|CPU")
