"""CUDA graphs of decode: a DWDP rank's forward is its own, so its graph is chosen by its own batch."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.hooks import Hook


def is_local(_model_runner: Any) -> bool:
    """In place of `DecodeCudaGraphRunner._forward_is_dp_local`.

    SGLang would choose a graph by the largest batch of all ranks, a number that DWDP's schedulers do not gather.
    """
    return True


HOOKS = (
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._forward_is_dp_local",
        HookType.REPLACE,
        is_local,
    ),
)
