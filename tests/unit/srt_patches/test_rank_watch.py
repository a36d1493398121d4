"""The launcher's watch over real processes, with a tokenizer manager that notes what it is told."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import unwrap_from_pickle
from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS

from sglang_dwdp.srt_patches import rank_watch
from sglang_dwdp.srt_patches.rank_watch import RankWatch, ask_all, is_stopped, monitor, update_all, watch_start
from sglang_dwdp.watch import Condition, Notice

NAMES = ["scheduler_0", "scheduler_1", "scheduler_2", "scheduler_3", "detokenizer"]  # the controller comes first


class Manager(SimpleNamespace):
    """As far as a `TokenizerManager` is used; its event loop runs in a thread."""

    def __init__(self) -> None:
        self.event_loop = asyncio.new_event_loop()
        super().__init__(enable_metrics=False, rid_to_state={"open": None}, event_loop=self.event_loop)
        self.load_snapshot_reader = SimpleNamespace(path="/nowhere", dp_size=3)
        self.model_update_result: Any = None
        self.model_update_tmp: list[str] = []
        self.notices: list[Notice] = []
        self._dispatch_to_scheduler = lambda notice: self.notices.append(unwrap_from_pickle(notice))
        for name, *_ in _COMMUNICATOR_SPECS:
            setattr(self, f"{name}_communicator", FanOutCommunicator(lambda _obj: None, 3))

    def conditions(self) -> list[tuple[str, ...]]:
        return [tuple(state.condition.value for state in notice.states) for notice in self.notices]


class Server:
    """Five child processes that sleep, and the watch over them."""

    def __init__(self, *, outlives: bool) -> None:
        self.manager, self.info = Manager(), dict[str, Any]()
        context = multiprocessing.get_context("spawn")
        self.processes = [context.Process(target=time.sleep, args=(600,)) for _ in NAMES]
        for process in self.processes:
            process.start()
        self.watchdog = SimpleNamespace(_names=NAMES, _processes=self.processes, _stop_event=threading.Event())
        self.watch = RankWatch(self.manager, self.info, 3, outlives=outlives)
        self.threads = [
            threading.Thread(target=self.manager.event_loop.run_forever),
            threading.Thread(target=self.watch.run, args=(self.watchdog,)),
        ]

    def rank(self, rank: int) -> Any:
        return self.processes[1 + rank]

    def close(self) -> None:
        self.watchdog._stop_event.set()
        self.threads[1].join()
        self.manager.event_loop.call_soon_threadsafe(self.manager.event_loop.stop)
        self.threads[0].join()
        for process in self.processes:
            process.kill()


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this process would have sent to itself."""
    sent: list[int] = []
    real = os.kill
    monkeypatch.setattr(
        rank_watch.os, "kill", lambda pid, what: sent.append(what) if pid == os.getpid() else real(pid, what)
    )
    return sent


@contextmanager
def started(*, outlives: bool = True) -> Iterator[Server]:
    server = Server(outlives=outlives)
    try:
        for thread in server.threads:
            thread.start()
        yield server
    finally:
        server.close()


def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_rank_is_told_and_the_server_goes_on(signals: list[int]) -> None:
    with started() as server:
        assert server.info["dwdp_ranks"] == "3 of 3 ranks serve"
        server.rank(1).kill()
        until(lambda: server.manager.notices)
        assert server.manager.notices[0].open_requests == ("open",)
        assert server.manager.conditions() == [("serving", "lost", "serving")]
        assert server.info["dwdp_ranks"].startswith("degraded: rank 1 of 3 lost at 2")
        assert "was ended by SIGKILL" in server.info["dwdp_ranks"]
        assert server.manager.flush_cache_communicator._fan_out == 2
        assert not signals
        server.rank(0).kill()
        until(lambda: len(server.manager.notices) == 2)
        assert not signals
        server.rank(2).kill()
        until(lambda: signals == [signal.SIGQUIT])


def test_with_exit_the_first_loss_ends_the_server(signals: list[int]) -> None:
    with started(outlives=False) as server:
        server.rank(1).kill()
        until(lambda: signals == [signal.SIGQUIT])
        assert not server.manager.notices


@pytest.mark.parametrize("name", ["scheduler_0", "detokenizer"])
def test_without_its_controller_or_detokenizer_a_server_ends(signals: list[int], name: str) -> None:
    with started() as server:
        server.processes[NAMES.index(name)].kill()
        until(lambda: signals == [signal.SIGQUIT])


def test_a_stopped_rank_is_told_and_comes_back(signals: list[int]) -> None:
    with started() as server:
        os.kill(server.rank(2).pid, signal.SIGSTOP)
        until(lambda: server.manager.notices)
        assert server.manager.get_internal_state_communicator._fan_out == 2
        assert server.manager.flush_cache_communicator._fan_out == 3
        os.kill(server.rank(2).pid, signal.SIGCONT)
        until(lambda: len(server.manager.notices) == 2)
        assert server.manager.conditions()[1] == ("serving", "serving", "serving")
        assert server.info["dwdp_ranks"] == "3 of 3 ranks serve"
    assert not signals


def test_a_question_that_waits_for_a_lost_rank_is_answered_by_the_others() -> None:
    with started() as server:
        communicator = server.manager.get_internal_state_communicator
        waiting = asyncio.run_coroutine_threadsafe(communicator("how are you?"), server.manager.event_loop)
        until(lambda: communicator._result_values is not None)
        for answer in ("fine", "well"):
            server.manager.event_loop.call_soon_threadsafe(communicator.handle_recv, answer)
        assert not waiting.done()
        server.rank(0).kill()
        assert waiting.result(5) == ["fine", "well"]


def test_an_update_of_weights_that_waits_for_a_lost_rank_ends() -> None:
    manager = Manager()
    watch = RankWatch(manager, {}, 3, outlives=True)
    watch._watch.look({1: "ended"}, [], [1, 1, 1])
    manager.model_update_result, manager.model_update_tmp = asyncio.Future(loop=manager.event_loop), ["failed"]
    watch.apply(watch._watch.states)
    assert not manager.model_update_result.done()
    assert manager.model_update_expected_workers == 2  # so SGLang ends it with the next answer
    manager.model_update_tmp.append("failed too")
    watch.apply(watch._watch.states)
    assert manager.model_update_result.result() == ["failed", "failed too"]


@pytest.mark.parametrize(
    ("state", "name", "answered"),
    [
        ("lost", "flush_cache", True),
        ("lost", "update_weights_from_tensor", False),
        ("lost", "release_memory_occupation", False),
        ("lost", "get_internal_state", True),
        ("not responding", "flush_cache", False),
        ("not responding", "get_internal_state", True),
    ],
)
def test_which_requests_to_all_ranks_can_be_made(
    state: str, name: str, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager()
    watch = RankWatch(manager, {}, 3, outlives=True)
    monkeypatch.setattr(rank_watch, "_current", [watch])

    async def original(_communicator: Any, question: str) -> str:
        return question

    def ask() -> Any:
        return asyncio.run(ask_all(original, getattr(manager, f"{name}_communicator"), "question"))

    assert ask() == "question"
    watch._watch.look({1: "ended"} if state == "lost" else {}, [1] if state == "not responding" else [], [1, 1, 1])
    if answered:
        assert ask() == "question"
    else:
        with pytest.raises(HTTPException, match=f"{name} needs all ranks: degraded: rank 1 of 3 {state}") as found:
            ask()
        assert found.value.status_code == 503


@pytest.fixture(autouse=True)
def sigquit() -> Iterator[None]:
    """`watch_start` has a handler of its own."""
    before = signal.getsignal(signal.SIGQUIT)
    yield
    signal.signal(signal.SIGQUIT, before)


def test_an_update_from_disk_needs_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = RankWatch(Manager(), {}, 3, outlives=True)
    monkeypatch.setattr(rank_watch, "_current", [watch])

    async def original(_manager: Any) -> str:
        return "updated"

    assert asyncio.run(update_all(original, None)) == "updated"
    watch._watch.look({1: "ended"}, [], [1, 1, 1])
    with pytest.raises(HTTPException, match="update_weights_from_disk needs all ranks: degraded: rank 1 of 3 lost"):
        asyncio.run(update_all(original, None))


def test_a_rank_that_is_killed_before_all_are_ready_ends_the_start(
    signals: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_watch, "config_of", lambda arguments: arguments)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=time.sleep, args=(600,)) for _ in range(3)]  # the controller comes first
    for process in processes:
        process.start()
    try:
        watch_start((None, processes), Server, None)  # not a server with DWDP
        watch_start((None, processes), Server, "with DWDP")
        processes[2].kill()
        until(lambda: signals == [signal.SIGQUIT])
        assert "rank 1 of 2 was ended by SIGKILL" in caplog.text
        assert caplog.text.count("before the server was ready") == 1
    finally:
        for process in processes:
            process.kill()


def test_a_killed_rank_is_named_though_a_peer_tells_first_that_it_failed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_watch, "config_of", lambda arguments: arguments)
    monkeypatch.setattr(rank_watch, "_until_ready", lambda ranks: None)  # a thread that has not been run yet
    said: list[str] = []
    signal.signal(signal.SIGQUIT, lambda *_: said.append(caplog.text))
    processes = [SimpleNamespace(exitcode=code) for code in (None, 1, None)]
    watch_start((None, processes), Server, "with DWDP")
    signal.raise_signal(signal.SIGQUIT)
    processes[2].exitcode = -signal.SIGKILL
    signal.raise_signal(signal.SIGQUIT)
    signal.raise_signal(signal.SIGQUIT)
    named = "DWDP: rank 1 of 2 was ended by SIGKILL"
    assert [text.count(named) for text in said] == [0, 1, 1]


def test_sglangs_own_watch_goes_on_where_this_one_fails_or_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    broken = RankWatch(Manager(), {}, 3, outlives=True)
    watchdog: Any = SimpleNamespace(_names=NAMES, _processes=[])  # too few
    for watches, names in (([], NAMES), ([broken], NAMES), ([broken], NAMES[:2])):
        monkeypatch.setattr(rank_watch, "_current", watches)
        watchdog._names = names
        monitor(ran.append, watchdog)
    assert ran == [watchdog] * 3


def test_conditions_have_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    gauge = prometheus_client.Gauge
    monkeypatch.setattr(prometheus_client, "Gauge", lambda *args, **how: gauge(*args, **how, registry=registry))
    manager = Manager()
    manager.enable_metrics, manager.metrics_collector = True, SimpleNamespace(labels={"model_name": "m"})
    watch = RankWatch(manager, {}, 3, outlives=True)
    watch._watch.look({1: "ended"}, [], [1, 1, 1])
    watch.apply(watch._watch.states)
    numbers = {
        condition: registry.get_sample_value("sglang:dwdp_ranks", {"model_name": "m", "condition": condition.value})
        for condition in Condition
    }
    assert numbers == {Condition.SERVING: 2, Condition.SILENT: 0, Condition.LOST: 1}


def test_stopped_processes() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        until(lambda: is_stopped(process.pid))
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(process.pid)
