"""CUDA graphs of joint forwards: a second one of each decode bucket, and of some prefill buckets.

SGLang has names for variants of a bucket's decode graph (for LoRA), and takes one of DWDP there. Its prefill graphs
have no such names, so the key of a joint one is changed where graphs are kept. In a joint forward all ranks replay the
largest bucket that a rank of them needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.exchange.round import MAX_DECODE_ROWS
from sglang_dwdp.srt_patches.exchange import current_steps
from sglang_dwdp.srt_patches.exchange_steps import ExchangeSteps
from sglang_dwdp.srt_patches.forward import current_runtime
from sglang_dwdp.srt_patches.hooks import Hook

_VARIANT = "dwdp_exchange"
_READ_PER_US = 376_000  # bytes between two H100, for --dwdp-view direct, with which nothing is copied


def capture_decode(original: Callable[..., None], runner: Any, size: int, *args: Any, **kwargs: Any) -> None:
    """Around `DecodeCudaGraphRunner.capture_one_shape`: each bucket is captured once more, as a joint forward."""
    original(runner, size, *args, **kwargs)
    steps = current_steps()
    if steps is None or runner.model_runner.is_draft_worker or size > MAX_DECODE_ROWS:
        return
    forward_fn, stream_idx = args[0], args[1] if len(args) > 1 else None
    with steps.layers.capture(size):
        original(runner, size, forward_fn, stream_idx, _VARIANT)
        steps.layers.capture_help(size)
    if size & (size - 1) == 0:  # the times of others lie between theirs
        steps.layers.time_copies(_copies())
        _time(steps, runner, size, args)


def _copies() -> Callable[[], Any] | float:
    """What a forward waits for that is not joint: copies of all experts, or the microseconds of reading as much."""
    runtime = current_runtime()
    prefetcher = runtime.staged.prefetcher
    return prefetcher.copy_all if prefetcher.depth else runtime.copy_bytes() / _READ_PER_US


def _time(steps: ExchangeSteps, runner: Any, size: int, args: Sequence[Any]) -> None:
    """Time the two graphs of a bucket, with tokens that differ: equal ones would read the same few experts."""
    stream_idx, *variants = (*args[1:], None, None, None)[:3]
    alone = runner._make_graph_key(size, stream_idx, *variants)
    joint = runner._make_graph_key(size, stream_idx, _VARIANT, *variants[1:])
    ids = runner.buffers.input_ids[: size * runner.captured_req_width]
    ids.random_(0, runner.model_runner.model_config.vocab_size)
    steps.layers.time_decode(
        size, lambda: runner.backend.replay(alone, None), lambda: runner.backend.replay(joint, None)
    )


def decode_variant(original: Callable[..., Any], runner: Any, forward_batch: Any) -> Any:
    """Around `DecodeCudaGraphRunner._resolve_lora_variant`: which of a bucket's two graphs is replayed."""
    steps = current_steps()
    return _VARIANT if steps is not None and steps.bucket else original(runner, forward_batch)


def capture_prefill(original: Callable[..., None], runner: Any, size: int, **kwargs: Any) -> None:
    """Around `PrefillCudaGraphRunner.capture_one_shape`: some buckets are captured once more, as joint forwards."""
    original(runner, size, **kwargs)
    steps = current_steps()
    if steps is None or runner.model_runner.is_draft_worker or size not in steps.prefill_buckets:
        return
    runtime = current_runtime()
    runtime.in_exchange_step = True
    try:
        with steps.layers.capture(size):
            original(runner, size, **kwargs)
            steps.layers.capture_help(size)
    finally:
        runtime.in_exchange_step = False
    steps.layers.time_copies(_copies())
    steps.layers.time_prefill(size)


def capture_key(original: Callable[..., None], backend: Any, key: Any, *args: Any, **kwargs: Any) -> None:
    """Around `BreakableCudaGraphBackend.capture_one`, which keeps the graph under its key."""
    original(backend, _joint_key(key), *args, **kwargs)


def replay_key(original: Callable[..., Any], backend: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `BreakableCudaGraphBackend.replay`. What a long prefill needs before takes milliseconds, too."""
    steps = current_steps()
    if steps is not None:
        steps.before_replay()
    return original(backend, _joint_key(key), *args, **kwargs)


def _joint_key(key: Any) -> Any:
    steps = current_steps()
    is_joint = steps is not None and steps.bucket and key.variant_label is None
    return replace(key, variant_label=_VARIANT) if is_joint else key


def can_run_prefill(original: Callable[..., bool], runner: Any, *args: Any, **kwargs: Any) -> bool:
    """Around `PrefillCudaGraphRunner.can_run_graph`, which rejects a bucket of more than twice a batch's tokens: the
    largest of all ranks may be that."""
    steps = current_steps()
    if steps is None:
        return original(runner, *args, **kwargs)
    with steps.forwards.apart():
        return original(runner, *args, **kwargs)


def padded_size(original: Callable[..., int], raw_size: int, buckets: Sequence[int]) -> int:
    """Around `BaseCudaGraphRunner._pad_to_bucket`: in a joint forward all ranks take the largest bucket."""
    steps = current_steps()
    return original(raw_size if steps is None else max(raw_size, steps.bucket), buckets)


_RUNNERS = "sglang.srt.model_executor.runner"
_DECODE = f"{_RUNNERS}.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_PREFILL = f"{_RUNNERS}.prefill_cuda_graph_runner.PrefillCudaGraphRunner"
_BACKEND = "sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend.BreakableCudaGraphBackend"
HOOKS = (
    Hook(f"{_DECODE}.capture_one_shape", HookType.AROUND, capture_decode),
    Hook(f"{_DECODE}._resolve_lora_variant", HookType.AROUND, decode_variant),
    Hook(f"{_PREFILL}.capture_one_shape", HookType.AROUND, capture_prefill),
    Hook(f"{_PREFILL}.can_run_graph", HookType.AROUND, can_run_prefill),
    Hook(f"{_BACKEND}.capture_one", HookType.AROUND, capture_key),
    Hook(f"{_BACKEND}.replay", HookType.AROUND, replay_key),
    Hook(f"{_RUNNERS}.base_cuda_graph_runner.BaseCudaGraphRunner._pad_to_bucket", HookType.AROUND, padded_size),
)
