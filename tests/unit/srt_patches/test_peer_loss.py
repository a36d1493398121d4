"""A rank whose peer has left a joint forward runs it again, alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange import page
from sglang_dwdp.exchange.lock import unlock
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.policy import StepTimes
from sglang_dwdp.srt_patches import exchange, exchange_results

LOST = DwdpRuntimeError("rank 0: MoE layer 2 of a joint forward: rank 1 sent no rows: its process ended.")


class Steps:
    """Forwards are joint until one fails; `page_lost` lets the page of rounds be out of reach."""

    def __init__(self) -> None:
        self.joint, self.page_lost = True, False
        self.housekeeping_at = float("inf")
        self.said: list[Any] = []
        self.forwards = SimpleNamespace(end=lambda: self.said.append("gave up"))

    def begin(self, rows: int, *, is_decode: bool) -> bool:
        if self.page_lost:
            raise LOST
        return self.joint and is_decode

    def bucket_of(self, rows: int, *, is_decode: bool) -> int:
        return 512 if not is_decode and rows <= 512 else 0

    def end(self, *, is_joint: bool) -> None:
        self.said.append("joint" if is_joint else "alone")

    def help_out(self) -> bool:
        raise LOST

    def wait(self) -> None:
        if self.page_lost:
            raise LOST
        self.said.append("waited")

    def while_scheduling(self, *, is_prefill_next: bool = False) -> None:
        self.said.append("helps before a long prefill" if is_prefill_next else "helps")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    result, runtime = Steps(), SimpleNamespace(in_exchange_step=False)
    monkeypatch.setattr(exchange, "current_runtime", lambda: runtime)
    exchange._current[:] = [result]  # type: ignore[list-item]
    yield result
    exchange._current.clear()


def forward(*outcomes: Any) -> Any:
    """A decode forward whose runs have these outcomes, one after the other."""
    runs = iter(outcomes)

    def original(*_args: Any) -> Any:
        outcome = next(runs)
        if isinstance(outcome, Exception):
            raise outcome
        return f"{outcome}, {'joint' if exchange.current_runtime().in_exchange_step else 'alone'}"

    runner = SimpleNamespace(is_draft_worker=False)
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: True), batch_size=3)
    return exchange.forward(original, runner, batch)


def test_a_joint_forward(steps: Steps) -> None:
    assert forward("tokens") == "tokens, joint"
    assert steps.said == ["joint"]


@pytest.mark.parametrize(
    ("device", "has_graphs", "fits", "extends", "rows"),
    [
        ("cuda", True, True, True, 7),
        ("cuda", True, False, True, 0),
        ("cuda", True, True, False, 0),
        ("cuda", False, False, True, 0),
        ("cpu", False, False, True, 7),
    ],
)
def test_a_prefill_without_a_graph_is_not_joint(
    steps: Steps,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    *,
    has_graphs: bool,
    fits: bool,
    extends: bool,
    rows: int,
) -> None:
    began: list[tuple[int, bool]] = []
    monkeypatch.setattr(steps, "begin", lambda rows, is_decode: bool(began.append((rows, is_decode))))
    graphs = SimpleNamespace(can_run_graph=lambda _batch: fits) if has_graphs else None
    runner = SimpleNamespace(is_draft_worker=False, device=device, prefill_cuda_graph_runner=graphs)
    mode = SimpleNamespace(is_decode=lambda: False, is_extend=lambda: extends)
    exchange.forward(lambda *_args: None, runner, SimpleNamespace(forward_mode=mode, _forward_num_tokens=lambda: 7))
    assert began == [(rows, False)]


def test_sglang_is_not_asked_for_the_graph_of_a_long_prefill(steps: Steps) -> None:
    def asked(_batch: Any) -> bool:
        raise AssertionError

    runner = SimpleNamespace(device="cuda", prefill_cuda_graph_runner=SimpleNamespace(can_run_graph=asked))
    batch = SimpleNamespace(_forward_num_tokens=lambda: 4096)
    assert exchange._prefill_rows(steps, runner, batch) == 4096  # type: ignore[arg-type]


def test_a_peer_that_leaves_it(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    assert forward(LOST, "tokens") == "tokens, alone"
    assert steps.said == ["gave up", "alone"]
    assert "rank 1 sent no rows: its process ended" in caplog.text


def test_a_peer_that_keeps_the_page(steps: Steps) -> None:
    steps.page_lost = True
    assert forward("tokens") == "tokens, alone"


def test_an_error_of_this_ranks_own_stays_one(steps: Steps) -> None:
    with pytest.raises(DwdpRuntimeError):
        forward(LOST, LOST)
    steps.joint = False
    with pytest.raises(DwdpRuntimeError):
        forward(LOST, "not run")


def test_an_idle_rank_goes_on(steps: Steps) -> None:
    idled: list[Any] = []
    exchange.idle(idled.append, SimpleNamespace(ipc_channels=None))
    assert len(idled) == 1
    assert steps.said == ["gave up"]


@pytest.mark.parametrize(("waits_here", "helps"), [(True, 1), (False, 3)])
def test_a_rank_whose_requests_wait_helps_once_at_a_time(steps: Steps, *, waits_here: bool, helps: int) -> None:
    """They may wait for a grammar, of which no socket tells, while peers ring step after step."""
    rings, helped = iter((True, True, False)), list[int]()
    bell, requests = os.eventfd(1), zmq.Context().socket(zmq.PULL)

    def help_out() -> bool:
        helped.append(1)
        if not next(rings):
            os.eventfd_read(bell)  # peers have stopped
        return True

    steps.help_out = help_out  # type: ignore[method-assign]
    steps.bells = SimpleNamespace(fileno=lambda: bell, silence=lambda: None)  # type: ignore[attr-defined]
    channels = SimpleNamespace(recv_from_tokenizer=requests, recv_from_rpc=None)
    try:
        exchange.idle(
            lambda _scheduler: None, SimpleNamespace(ipc_channels=channels, is_fully_idle=lambda: not waits_here)
        )
    finally:
        requests.close()
        os.close(bell)
    assert len(helped) == helps


def test_a_rank_that_helps_for_long_gives_signs_of_life(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the launcher would take it for one that does not respond, and send it no requests."""
    clock, helped, idled = iter(0.1 * step for step in range(1000)), list[int](), list[Any]()
    bell, requests = os.eventfd(1), zmq.Context().socket(zmq.PULL)  # it rings all the time
    monkeypatch.setattr(exchange, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def help_out() -> bool:
        helped.append(1)
        assert len(helped) < 100
        return True

    steps.help_out, steps.housekeeping_at = help_out, 0.0  # type: ignore[method-assign]
    steps.bells = SimpleNamespace(fileno=lambda: bell, silence=lambda: None)  # type: ignore[attr-defined]
    channels = SimpleNamespace(recv_from_tokenizer=requests, recv_from_rpc=None)
    try:
        for _ in range(6):
            exchange.idle(idled.append, SimpleNamespace(ipc_channels=channels, is_fully_idle=lambda: True))
    finally:
        requests.close()
        os.close(bell)
    assert len(idled) == 3
    assert len(helped) > 20


def a_request(middle_chunks: int) -> Any:
    return SimpleNamespace(
        inflight_middle_chunks=middle_chunks, to_finish=None, discard_output_reason=None, skip_radix_cache_insert=False
    )


def test_requests_of_a_void_forward_end_with_an_error(steps: Steps) -> None:
    """Where the GPU waits, that a peer has left a forward is known only after it was launched."""
    whole, middle, before_last = a_request(0), a_request(1), a_request(1)
    scheduler = SimpleNamespace(chunked_req=middle, _pending_chunked_abort_req=None)
    batch = SimpleNamespace(reqs=[whole, middle, before_last], forward_mode=ForwardMode.MIXED)
    processed: list[Any] = []
    exchange_results.result(lambda *args: processed.append(args), scheduler, batch)
    assert whole.to_finish is middle.discard_output_reason is None
    steps.page_lost = True
    exchange_results.result(lambda *args: processed.append(args), scheduler, batch)
    assert processed == [(scheduler, batch)] * 2
    for reason in (whole.to_finish, middle.discard_output_reason, before_last.discard_output_reason):
        found = reason.to_json()
        assert (found["type"], found["status_code"]) == ("abort", 503)
        assert "rank 1 sent no rows" in found["message"]
    assert all(request.skip_radix_cache_insert for request in batch.reqs)
    assert scheduler._pending_chunked_abort_req is middle  # its next chunk is not launched
    assert middle.to_finish is before_last.to_finish is None
    assert steps.said.count("gave up") == 1


def test_peers_are_helped_while_the_scheduler_works(steps: Steps) -> None:
    batch = SimpleNamespace(extend_num_tokens=512, reqs=[], forward_mode=ForwardMode.EXTEND)

    def said(what: Any) -> Any:
        steps.said.append("scheduler")
        return what

    assert exchange_results.result(lambda *_: said("found"), SimpleNamespace(), batch) == "found"
    assert steps.said == ["waited", "helps", "scheduler", "helps"]
    for tokens, last in ((512, "helps"), (513, "helps before a long prefill"), (None, "helps")):
        steps.said.clear()
        batch.extend_num_tokens = tokens
        found = (batch if tokens else None, None)
        scheduler = SimpleNamespace(chunked_req=None)
        assert exchange_results.new_prefill(lambda _, found=found: said(found), scheduler) is found
        assert steps.said == ["helps", "scheduler", last]


@pytest.mark.parametrize(("tokens", "private", "held"), [(512, False, True), (513, False, False), (512, True, False)])
def test_a_chunk_is_cached_once_its_prompt_is_known_to_be_right(
    steps: Steps, tokens: int, private: bool, held: bool
) -> None:
    """SGLang caches a chunk when it schedules the next one, which may be before its result is known."""
    request = a_request(1)
    request.skip_radix_cache_insert = private
    scheduler = SimpleNamespace(chunked_req=request)
    batch = SimpleNamespace(extend_num_tokens=tokens, reqs=[request], forward_mode=ForwardMode.EXTEND)
    assert exchange_results.new_prefill(lambda _: (batch, None), scheduler)[0] is batch
    assert request.skip_radix_cache_insert is (held or private)
    exchange_results.result(lambda *_: None, scheduler, batch)
    assert request.skip_radix_cache_insert is (held or private)
    request.inflight_middle_chunks = 0  # of its last chunk
    exchange_results.result(lambda *_: None, scheduler, batch)
    assert request.skip_radix_cache_insert is private


def test_a_meeting_whose_page_cannot_be_had_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next forward does not wait for the page again, and peers do not wait for this rank, which had entered."""
    fd = page.create()
    times = StepTimes(((1, 2e6),), ((1, 1.0),))
    meeting = Meeting(page.Page(fd, 0, 2), times)
    holder = page.Page(fd, 1, 2)
    holder.change(lambda state: state.enter(0, 1))
    monkeypatch.setattr(page, "_LOCK_LIMIT_S", 0.05)
    try:
        holder._take()
        with pytest.raises(DwdpRuntimeError, match="rank 1 has held the page of rounds"):
            meeting.meet(1)
        assert meeting.ended
        assert meeting.meet(1) is None
        unlock(holder._fd, 0)
        peer = Meeting(holder, times)
        assert peer.meet(1) is None
        assert peer.ended
    finally:
        meeting.close()
        holder.close()
        os.close(fd)
