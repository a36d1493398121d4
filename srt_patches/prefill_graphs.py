"""Prefills in SGLang's breakable CUDA graphs: captured pieces wait for the experts that they read.

Such a graph is a list of captured segments with Python calls (attention) between them, which are not captured, so
copies go on there as in an eager forward. A segment with MoE layers is replaced by one that waits for their slots
before its replay and releases them after it; nothing else of SGLang's capture or replay changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.forward import current_runtime
from sglang_dwdp.srt_patches.hooks import Hook


def is_capturing() -> bool:
    """Whether a segment is being captured; False between segments, and in warm-ups."""
    capture = breakable_cuda_graph._current_capture_var.get()
    return capture is not None and capture._current_graph is not None


def capture_shape(original: Callable[..., None], runner: Any, size: int, **kwargs: Any) -> None:
    """Around `PrefillCudaGraphRunner.capture_one_shape`: the bucket decides the views, as it will at every replay."""
    with current_runtime().capture(size, is_capturing):
        original(runner, size, **kwargs)


def append_segment(_result: None, graph: Any, *_args: Any, **_kwargs: Any) -> None:
    """After `BreakableCUDAGraph._append_segment`: the last segment, with its waits and releases."""
    graph._segments[-1] = current_runtime().staged.segment(graph._segments[-1])


_RUNNER = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner"
_GRAPH = "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph.BreakableCUDAGraph"
HOOKS = (
    Hook(f"{_RUNNER}.capture_one_shape", HookType.AROUND, capture_shape),
    Hook(f"{_GRAPH}._append_segment", HookType.AFTER, append_segment),
)
