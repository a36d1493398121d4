"""Between a rank's forwards (--dwdp-exchange): results that may be void, and peers that wait meanwhile.

Of a joint forward that a peer has left, no result may reach a user or the radix cache. On GPUs that a peer has left is
known only when the result is asked for, after the next forward was launched. SGLang publishes a chunk's KV when it
schedules the next chunk, which may be sooner. So a prompt in chunks that may be joint is kept out of the cache until
its last chunk is known to be right.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.srt_patches.exchange import current_steps, go_on_alone
from sglang_dwdp.srt_patches.exchange_steps import ExchangeSteps
from sglang_dwdp.srt_patches.hooks import Hook

_HELD = "dwdp_held_back"  # an attribute of a request that is kept out of the cache here


def new_prefill(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Scheduler._get_new_batch_prefill_raw`: keep a prompt with more chunks to come out of the cache."""
    steps = current_steps()
    if steps is None:
        return original(scheduler, *args, **kwargs)
    steps.while_scheduling()
    found = original(scheduler, *args, **kwargs)
    batch, request = found[0], scheduler.chunked_req
    may_be_joint = batch is not None and steps.bucket_of(batch.extend_num_tokens, is_decode=False) > 0
    steps.while_scheduling(is_prefill_next=batch is not None and not may_be_joint)
    if may_be_joint and request is not None and not request.skip_radix_cache_insert:
        request.skip_radix_cache_insert = True
        setattr(request, _HELD, True)
    return found


def result(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Scheduler.process_batch_result`: wait for the forward first, and help others meanwhile."""
    steps = current_steps()
    if steps is None:
        return original(scheduler, batch, *args, **kwargs)
    _wait(steps, scheduler, batch)
    steps.while_scheduling()
    found = original(scheduler, batch, *args, **kwargs)
    steps.while_scheduling()
    return found


def _wait(steps: ExchangeSteps, scheduler: Any, batch: Any) -> None:
    """If a peer has left the forward, its requests end with HTTP 503."""
    try:
        steps.wait()
    except DwdpRuntimeError as error:
        go_on_alone(error)
        for request in batch.reqs:
            _abort(scheduler, request, error)
        return
    if batch.forward_mode.is_decode():
        return
    for request in batch.reqs:
        if getattr(request, _HELD, False) and not request.inflight_middle_chunks:
            request.skip_radix_cache_insert = False
            setattr(request, _HELD, False)


def _abort(scheduler: Any, request: Any, error: DwdpRuntimeError) -> None:
    request.skip_radix_cache_insert = True  # others would read KV that is void
    setattr(request, _HELD, False)
    reason = FINISH_ABORT(f"{error} Send the request again.", HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailable")
    if not request.inflight_middle_chunks:
        request.to_finish = reason
        return
    request.discard_output_reason = reason  # with the result of its last chunk, if that is launched
    if scheduler.chunked_req is request:
        scheduler._pending_chunked_abort_req = request  # else before the next


HOOKS = (
    Hook("sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw", HookType.AROUND, new_prefill),
    Hook("sglang.srt.managers.scheduler.Scheduler.process_batch_result", HookType.AROUND, result),
)
