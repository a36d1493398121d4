"""The controller's part of outliving a rank: no request goes to one that does not serve, and those that were with a
lost one are answered.

The launcher sends a notice through the queue that requests come by, so all requests before it were handed out under
the old conditions and all after it under the new ones. What is answered here is answered as a rank would: with an
abort, which SGLang's front ends turn into HTTP 503, an error chunk of a stream, or an exception of `Engine`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import zmq
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import (
    AbortReq,
    GetInternalStateReq,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
    sock_send,
)
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.watch import Condition, Notice, RankState, living, serving

_UNREACHED_S = 1.0
_REMEMBERED = 1 << 16  # requests; more are not open at a time
_REQUESTS = (TokenizedGenerateReqInput, TokenizedEmbeddingReqInput)


class Traffic:
    """Which rank has which request, and who may get the next one."""

    def __init__(self, controller: Any) -> None:
        """Hand out requests to all workers of `controller`, SGLang's `DataParallelController`."""
        self._controller = controller
        self._states: tuple[RankState, ...] = ()
        self._unreached: dict[int, float] = {}  # ranks, and until when they get no requests
        self._rank_of: OrderedDict[str, int] = OrderedDict()
        self._ranks = {id(worker): rank for rank, worker in enumerate(controller.workers)}
        self._answers: Any = None

    def rank(self, socket: Any) -> int | None:
        """The rank that a socket leads to; None for any other socket."""
        return self._ranks.get(id(socket))

    def why_not(self, rank: int) -> str:
        """Why a rank gets no requests; empty where it does."""
        if rank in self._unreached:
            return f"rank {rank} is not reached"
        if not self._states or self._states[rank].condition is Condition.SERVING:
            return ""
        return f"rank {rank} is {self._states[rank].condition}: {self._states[rank].why}"

    def takes(self, rank: int, request: Any) -> bool:
        """Whether a request may go to a rank, which is remembered; if not, it is answered."""
        why = self.why_not(rank)
        if why:
            self._answer(request.rid, why)
            return False
        self._rank_of[request.rid] = rank
        if len(self._rank_of) > _REMEMBERED:
            self._rank_of.popitem(last=False)
        return True

    def give_back(self, rank: int, request: Any) -> None:
        """Answer a request that did not reach its rank, which gets no more for a moment: a notice may follow."""
        self._rank_of.pop(request.rid, None)
        self._answer(request.rid, f"rank {rank} is not reached")
        if any(not self.why_not(other) for other in range(len(self._controller.workers)) if other != rank):
            self._unreached[rank] = time.monotonic() + _UNREACHED_S
            self._hand_out()

    def heed(self, notice: Notice) -> None:
        """The conditions of ranks have changed.

        Requests of a rank that does not respond wait for it, but for health checks: any answer is one to them.
        """
        controller, before = self._controller, self._states
        self._states = notice.states
        self._unreached.clear()
        for rank, state in enumerate(notice.states):
            if before and before[rank].condition is not state.condition is Condition.SERVING:
                controller.dp_budget.total_tokens[rank] = controller.dp_budget.total_requests[rank] = 0
        self._hand_out()
        lives, serves = living(notice.states), serving(notice.states)
        open_requests = set(notice.open_requests)
        for rid, rank in list(self._rank_of.items()):
            if rid not in open_requests:
                del self._rank_of[rid]
            elif not lives[rank] or (not serves[rank] and rid.startswith(HEALTH_CHECK_RID_PREFIX)):
                del self._rank_of[rid]
                self._answer(rid, self.why_not(rank))

    def _hand_out(self) -> None:
        """Hand out requests to the ranks that get some."""
        self._controller.status = [not self.why_not(rank) for rank in range(len(self._controller.workers))]
        self._controller._refresh_active_workers()
        self.avoid()

    def avoid(self) -> None:
        """Let no load balancing find that a rank which does not serve has the least to do."""
        if any(until < time.monotonic() for until in self._unreached.values()):
            self._unreached.clear()
            self._hand_out()
        budget = self._controller.dp_budget
        for rank in range(len(self._controller.workers)):
            if self.why_not(rank):
                budget.total_tokens[rank] = budget.total_requests[rank] = float("inf")

    def listeners(self, message: Any) -> list[Any]:
        """The workers that a message to all goes to: those that live, since what it says holds for them later too.

        A question about the state is answered by those that can answer now.
        """
        states, workers = self._states, self._controller.workers
        if not states:
            return list(workers)
        reached = serving(states) if isinstance(message, GetInternalStateReq) else living(states)
        return [worker for worker, is_reached in zip(workers, reached, strict=True) if is_reached]

    def _answer(self, rid: str, why: str) -> None:
        if self._answers is None:
            controller = self._controller
            self._answers = controller.context.socket(zmq.PUSH)
            self._answers.connect(controller.port_args.tokenizer_ipc_name)
        reason = {
            "type": "abort",
            "message": f"DWDP: {why}. The other ranks serve: send the request again.",
            "status_code": int(HTTPStatus.SERVICE_UNAVAILABLE),
            "err_type": "ServiceUnavailable",
        }
        sock_send(self._answers, AbortReq(rid=rid, finished_reason=reason))


_current: list[Traffic] = []  # of this process: none, or one


def traffic_of(controller: Any) -> Traffic:
    """Made by the controller's event loop, before the first request."""
    _current[:] = [Traffic(controller)]
    return _current[0]


def send(original: Callable[..., None], socket: Any, message: Any, *args: Any, **kwargs: Any) -> None:
    """Around `sock_send`, as the controller calls it.

    A socket whose other end is gone would hold the controller until somebody connects again, and with it all requests.
    """
    traffic = _current[0] if _current else None
    rank = traffic.rank(socket) if traffic else None
    if traffic is None or rank is None:
        original(socket, message, *args, **kwargs)
        return
    is_request = isinstance(message, _REQUESTS)
    if is_request and not traffic.takes(rank, message):
        return
    try:
        original(socket, message, flags=zmq.NOBLOCK)
    except zmq.Again:  # its process has just ended, or reads nothing; a notice will follow
        if is_request:
            traffic.give_back(rank, message)


def route(original: Callable[..., Any], controller: Any, request: Any) -> Any:
    """Around `DataParallelController.maybe_external_dp_rank_routing`, which ends the controller where the rank that a
    request names is not active."""
    rank = request.routed_dp_rank
    if rank is not None and _current and _current[0].why_not(rank):
        return not _current[0].takes(rank, request)
    return original(controller, request)


def avoid_silent(_result: None, _controller: Any) -> None:
    """After `DataParallelController.refresh_load_budget`."""
    if _current:
        _current[0].avoid()


def send_to_living(controller: Any, message: Any) -> None:
    """In place of `DataParallelController.send_control_message`."""
    for worker in _current[0].listeners(message) if _current else controller.workers:
        send(sock_send, worker, message)


_CONTROLLER = "sglang.srt.managers.data_parallel_controller"
HOOKS = (
    Hook(f"{_CONTROLLER}.sock_send", HookType.AROUND, send),
    Hook(f"{_CONTROLLER}.DataParallelController.maybe_external_dp_rank_routing", HookType.AROUND, route),
    Hook(f"{_CONTROLLER}.DataParallelController.refresh_load_budget", HookType.AFTER, avoid_silent),
    Hook(f"{_CONTROLLER}.DataParallelController.send_control_message", HookType.REPLACE, send_to_living),
)
