"""Results of joint forwards (--dwdp-exchange): of one that a peer has left, none may reach a user or the radix cache.

On GPUs that a peer has left is known only when the result is asked for, after the next forward was launched. SGLang
publishes a chunk's KV when it schedules the next chunk, which may be sooner. So a prompt in chunks that may be joint is
kept out of the cache until its last chunk is known to be right.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.srt_patches.exchange import current_steps, go_on_alone
from sglang_dwdp.srt_patches.hooks import Hook

_HELD = "dwdp_held_back"  # an attribute of a request that is kept out of the cache here


def new_prefill(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Scheduler._get_new_batch_prefill_raw`: keep a prompt with more chunks to come out of the cache."""
    found = original(scheduler, *args, **kwargs)
    steps, batch, request = current_steps(), found[0], scheduler.chunked_req
    if steps is None or batch is None or request is None or request.skip_radix_cache_insert:
        return found
    if steps.bucket_of(batch.extend_num_tokens, is_decode=False):
        request.skip_radix_cache_insert = True
        setattr(request, _HELD, True)
    return found


def before_result(scheduler: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before `Scheduler.process_batch_result`: wait for the forward, and help others meanwhile.

    If a peer has left it, its requests end with HTTP 503.
    """
    steps = current_steps()
    if steps is None:
        return
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
    Hook("sglang.srt.managers.scheduler.Scheduler.process_batch_result", HookType.BEFORE, before_result),
)
