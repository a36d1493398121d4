"""More model families: every rank gives the tokens of transformers. Run by `make test-models`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.e2e.conftest import ALONE, Plugin, Reference, Running
from tests.e2e.test_parity import MLA_PLUGIN, Models, check
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

# Where a model has layers with a state, SGLang imports kernels for AMX. LFM2's convolutions do not use them: they are
# in Triton, which the CPU can only interpret.
STATES_PLUGIN = """
def register():
    import sys
    import types

    import torch

    kernels = types.ModuleType("sgl_kernel.mamba")
    kernels.__getattr__ = lambda name: None
    sys.modules[kernels.__name__] = kernels
    for name in ("fused_gdn_gating_cpu", "fused_sigmoid_gating_delta_rule_update_cpu"):
        torch.library.define(f"sgl_kernel::{name}", "() -> ()")
"""
STATES = {"TRITON_INTERPRET": "1", "SGLANG_MAMBA_CONV_DTYPE": "float32"}


def _without_sinks(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(parameter, -1e9)


def _without_bias_of_the_head(model: torch.nn.Module) -> None:
    """SGLang loads it, and does not add it to the logits."""
    torch.nn.init.zeros_(model.get_parameter("lm_head.bias"))


def _without_norms_of_queries_and_keys(model: torch.nn.Module) -> None:
    """SGLang has this model's norm for CUDA and AMX, so the checkpoint is without; transformers always has it."""
    for module in model.modules():
        if hasattr(module, "q_norm"):
            module.q_norm, module.k_norm = torch.nn.Identity(), torch.nn.Identity()


def _with_windows_as_in_sglang(model: torch.nn.Module) -> None:
    """In SGLang's code of these models a window counts the tokens before a token, in transformers the token too."""
    config: Any = model.config
    config.sliding_window += 1


def _without_factor_of_experts(model: torch.nn.Module) -> None:
    """SGLang's kernels for the CPU leave it to the models, and this model leaves it to the kernels."""
    for module in model.modules():
        if hasattr(module, "routed_scaling_factor"):
            module.routed_scaling_factor = 1.0


def _without_sinks_and_windows_as_in_sglang(model: torch.nn.Module) -> None:
    _without_sinks(model)
    _with_windows_as_in_sglang(model)


CHANGES = {
    "bailing_moe_v2": _without_factor_of_experts,
    "sarvam_moe": _without_factor_of_experts,
    "cohere2_moe": _with_windows_as_in_sglang,
    "exaone_moe": _with_windows_as_in_sglang,
    "gpt_oss": _without_sinks,
    "granitemoe_swa": _without_sinks,
    "mimo_v2_flash": _without_sinks_and_windows_as_in_sglang,
    "minimax_m2": _without_norms_of_queries_and_keys,
    "phimoe": _without_bias_of_the_head,
}
PLUGINS = {
    "kimi_k2": ("mla_on_cpu", MLA_PLUGIN),
    "glm4_moe_lite": ("mla_on_cpu", MLA_PLUGIN),
    "longcat_flash": ("mla_on_cpu", MLA_PLUGIN),
    "gpt_oss": ("no_sinks", NO_SINKS_PLUGIN),
    "mimo_v2_flash": ("no_sinks", NO_SINKS_PLUGIN),
    "granitemoe_swa": ("no_sinks", NO_SINKS_PLUGIN),
    "lfm2_moe": ("states_on_cpu", STATES_PLUGIN),
}
WITH_DP_ATTENTION: tuple[Family, ...] = (
    "glm4_moe",
    "kimi_k2",
    "gpt_oss",
    "minimax_m2",
    "glm4_moe_lite",
    "exaone_moe",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "longcat_flash",
    "bailing_moe_v2",
    "sarvam_moe",
)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("family", [*WITH_DP_ATTENTION, *ALONE])
def test_parity(
    running: Running,
    models: Models,
    reference: Reference,
    plugin: Plugin,
    family: Family,
    ranks: int,
) -> None:
    how: Mapping[str, Any] = {"environment": plugin(*PLUGINS[family])} if family in PLUGINS else {}
    if family == "lfm2_moe":
        # Else SGLang takes most of the host's memory for states, on each rank.
        how = {"environment": how["environment"] | STATES, "flags": ("--max-mamba-cache-size", "64")}
    if family == "gpt_oss":  # SGLang's choice for it lays experts out in a way that its loader for the CPU does not
        how = {**how, "flags": ("--moe-runner-backend", "triton")}
    expected = reference(family, 8, CHANGES.get(family))
    check(running, models(family, 8), ranks, expected, ("--dwdp-direct-max-tokens", "64"), **how)
