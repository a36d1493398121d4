"""Requests and messages go to ranks that can take them, and what a lost rank had is answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.data_parallel_controller import DataParallelController, DPBudget
from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqInput, GetInternalStateReq

from sglang_dwdp.srt_patches import rank_traffic
from sglang_dwdp.srt_patches.rank_traffic import Traffic, avoid_silent, route, send, send_to_living, traffic_of
from sglang_dwdp.watch import Condition, Notice, RankState

STATES = {
    "S": RankState(Condition.SERVING, 0.0),
    "-": RankState(Condition.SILENT, 0.0, "its process is stopped"),
    "x": RankState(Condition.LOST, 0.0, "was ended by SIGKILL"),
}


class Controller(SimpleNamespace):
    """Three ranks, and the socket by which a tokenizer manager is answered."""

    _refresh_active_workers = DataParallelController._refresh_active_workers

    def __init__(self) -> None:
        super().__init__(workers=["rank 0", "rank 1", "rank 2"], dp_active=[True] * 3, status=[True] * 3)
        self.dp_budget = DPBudget(3)
        answers = SimpleNamespace(connect=lambda address: setattr(self, "connected", address))
        self.context = SimpleNamespace(socket=lambda _kind: answers)
        self.port_args = SimpleNamespace(tokenizer_ipc_name="ipc://tokenizer")
        self.sent: list[tuple[Any, Any]] = []

    def answered(self) -> dict[str, tuple[int, str]]:
        """Status and message by request id; then forgotten."""
        found = {
            message.rid: (message.finished_reason["status_code"], message.finished_reason["message"])
            for _, message in self.sent
            if isinstance(message, AbortReq)
        }
        self.sent.clear()
        return found


class Request(SimpleNamespace):
    """As far as a `TokenizedGenerateReqInput` is used, which has many fields that it needs."""


def request(rid: str, rank: int | None = None) -> Request:
    return Request(rid=rid, routed_dp_rank=rank)


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    result = Controller()
    monkeypatch.setattr(rank_traffic, "sock_send", lambda socket, message, **_: result.sent.append((socket, message)))
    monkeypatch.setattr(rank_traffic, "_REQUESTS", Request)
    traffic_of(result)
    yield result
    rank_traffic._current.clear()


def heed(states: str, open_requests: tuple[str, ...] = ()) -> Traffic:
    [traffic] = rank_traffic._current
    traffic.heed(Notice(tuple(STATES[state] for state in states), open_requests))
    return traffic


def hand_out(controller: Controller, rid: str, rank: int) -> bool:
    """Whether a request reached the rank that SGLang chose."""
    sent: list[Any] = []
    send(lambda socket, message, flags: sent.append((socket, message.rid)), controller.workers[rank], request(rid))
    assert sent in ([], [(f"rank {rank}", rid)])
    return bool(sent)


def test_requests_of_a_lost_rank_are_answered_and_no_others(controller: Controller) -> None:
    for rid, rank in (("done", 1), ("open", 1), ("of another", 2)):
        assert hand_out(controller, rid, rank)
    heed("SxS", ("open", "of another", "not yet handed out"))
    assert controller.connected == "ipc://tokenizer"
    message = "DWDP: rank 1 is lost: was ended by SIGKILL. The other ranks serve: send the request again."
    assert controller.answered() == {"open": (503, message)}
    heed("Sxx", ("of another",))
    assert list(controller.answered()) == ["of another"]


def test_requests_of_a_stopped_rank_wait_for_it(controller: Controller) -> None:
    hand_out(controller, "open", 1)
    heed("S-S", ("open",))
    heed("SSS", ("open",))
    assert controller.answered() == {}
    heed("SxS", ("open",))
    assert list(controller.answered()) == ["open"]


def test_a_health_check_does_not_wait_for_a_stopped_rank(controller: Controller) -> None:
    check = f"{HEALTH_CHECK_RID_PREFIX}_1"
    hand_out(controller, check, 1)
    heed("S-S", (check,))
    assert list(controller.answered()) == [check]


@pytest.mark.parametrize("state", ["-", "x"])
def test_a_request_that_would_go_to_a_rank_that_does_not_serve(controller: Controller, state: str) -> None:
    heed(f"S{state}S")
    assert not hand_out(controller, "late", 1)
    assert list(controller.answered()) == ["late"]
    assert hand_out(controller, "other", 0)


def test_a_request_that_names_such_a_rank_does_not_end_the_controller(controller: Controller) -> None:
    def original(_controller: Any, req: Any) -> bool:
        return req.routed_dp_rank is not None

    assert route(original, controller, request("before", 1))
    heed("SxS")
    assert route(original, controller, request("named", 1))
    assert list(controller.answered()) == ["named"]
    assert route(original, controller, request("another", 0))
    assert not route(original, controller, request("no matter", None))
    assert controller.answered() == {}


def test_load_balancing_avoids_such_a_rank_until_it_serves(controller: Controller) -> None:
    budget = controller.dp_budget
    heed("-SS")
    assert controller._active_workers == [1, 2]
    assert controller.status == [False, True, True]
    budget.total_tokens = [0, 9, 9]  # as SGLang reads them anew
    avoid_silent(None, controller)
    assert min(budget.total_tokens) == 9
    heed("SSS")
    assert (budget.total_tokens[0], budget.total_requests[0]) == (0, 0)
    assert controller._active_workers == [0, 1, 2]


def test_messages_for_all_ranks_reach_those_that_live(controller: Controller) -> None:
    def reached(message: Any) -> list[str]:
        send_to_living(controller, message)
        workers = [socket for socket, _ in controller.sent]
        controller.sent.clear()
        return workers

    abort, question = AbortReq(rid="r"), GetInternalStateReq()
    assert reached(question) == ["rank 0", "rank 1", "rank 2"]
    heed("S-x")
    assert reached(abort) == reached(FlushCacheReqInput()) == ["rank 0", "rank 1"]
    assert reached(question) == ["rank 0"]


def test_other_messages_and_sockets_pass(controller: Controller) -> None:
    heed("xSS")
    sent: list[Any] = []
    send(lambda *args, **_: sent.append(args), controller.workers[0], AbortReq(rid="r"))
    send(lambda *args: sent.append(args), "elsewhere", request("r"))
    assert len(sent) == 2


def test_a_rank_that_has_just_ended_does_not_hold_the_controller(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has noticed yet. The socket is a real one, and its other end is gone."""
    context = zmq.Context()
    socket, rank = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    rank.connect(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
    controller.workers[1] = socket
    traffic_of(controller)

    def original(socket: zmq.Socket[bytes], _message: Any, flags: int) -> None:
        socket.send(b"", flags)

    try:
        until = time.monotonic() + 5
        while not socket.poll(10, zmq.POLLOUT):
            assert time.monotonic() < until
        send(original, socket, request("reached"))
        assert controller.answered() == {}
        rank.close(0)
        while socket.poll(10, zmq.POLLOUT):
            assert time.monotonic() < until
        send(original, socket, request("not reached"))
        send(original, socket, AbortReq(rid="r"))
        assert list(controller.answered()) == ["not reached"]
        assert controller._active_workers == [0, 2]  # before anybody has noticed
        clock = time.monotonic() + 2
        monkeypatch.setattr(rank_traffic, "time", SimpleNamespace(monotonic=lambda: clock))
        avoid_silent(None, controller)
        assert controller._active_workers == [0, 1, 2]  # it was for a moment only, as it turns out
    finally:
        context.destroy(0)


def test_the_memory_of_requests_is_bounded(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_traffic, "_REMEMBERED", 2)
    for rid in "abc":
        hand_out(controller, rid, 1)
    heed("SxS", ("a", "b", "c"))
    assert list(controller.answered()) == ["b", "c"]
