"""A session's turns go to the rank that has its history.

The rank follows from the session's id, so nothing has to be remembered or told. All ranks open a session, for clients
that name a rank themselves; the one that the turns go to answers, so that no turn can be there before the opening.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sglang_dwdp.srt_patches.hooks import Hook


def rank_of_session(session_id: str, ranks: int) -> int:
    """The rank of `ranks` that a session belongs to, in every process alike."""
    return zlib.crc32(session_id.encode()) % ranks


def route_turn(original: Callable[..., None], controller: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Around `DataParallelController.dispatching_with_trace`, for each request."""
    # A session with a history of its own, or one that requests name for the sake of the prefix that they share.
    session = getattr(request, "session_params", None)
    session_id = getattr(session, "id", None) or getattr(request, "session_id", None)
    if session_id and request.routed_dp_rank is None:
        request.routed_dp_rank = rank_of_session(session_id, len(controller.workers))
    original(controller, request, *args, **kwargs)


def open_session(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Around `Scheduler.open_session`, whose first rank answers: here it is the one that the session belongs to."""
    parallel = get_parallel()
    answers = rank_of_session(request.session_id, parallel.tp_size) == parallel.tp_rank
    with parallel.override(tp_rank=0 if answers else 1):
        return original(scheduler, request)


CONTROLLER_HOOKS = (
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.dispatching_with_trace",
        HookType.AROUND,
        route_turn,
    ),
)
SCHEDULER_HOOKS = (Hook("sglang.srt.managers.scheduler.Scheduler.open_session", HookType.AROUND, open_session),)
