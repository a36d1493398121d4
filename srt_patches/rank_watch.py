"""The launcher watches its ranks: what it does when one is lost, does not respond, or responds again.

The ranks are its child processes, so the kernel tells at once that one has ended, and how. A stopped one is seen in
/proc, and one that is stuck by the load that SGLang's schedulers publish between forwards, and once a second when
idle. So a rank does nothing for this, least of all in a forward.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from multiprocessing import connection
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from sglang.srt.managers.io_struct import wrap_as_pickle
from sglang.srt.managers.load_snapshot import ShmLoadSnapshotReader
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.counters import RANKS
from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.lost_rank import how_it_ended
from sglang_dwdp.watch import Condition, Notice, RankState, Watch, living, serving, status

logger = logging.getLogger(__name__)
_INTERVAL_S = 0.5
_STATUS = "dwdp_ranks"  # in /server_info
_QUESTION = "get_internal_state"  # what ranks that serve answer for all
_UPDATES = ("weight", "memory_occupation")  # in the names of requests that need every rank


class RankWatch:
    """Watches the ranks of one server, in a thread of the launcher's."""

    def __init__(self, manager: Any, info: dict[str, Any], size: int, *, outlives: bool) -> None:
        """Watch nothing yet.

        Args:
            manager: SGLang's `TokenizerManager`.
            info: What /server_info shows of the ranks; the status is kept in it.
            size: Ranks of the server.
            outlives: Whether the server goes on when a rank is lost.
        """
        self._manager, self._info, self._outlives = manager, info, outlives
        self._watch = Watch(size)
        loads = manager.load_snapshot_reader  # which the event loop uses
        self._loads = ShmLoadSnapshotReader(loads.path, loads.dp_size)
        self._told: tuple[RankState, ...] = self._watch.states
        self._gauges = _gauges(manager)
        self._show(self._watch.states)

    def run(self, watchdog: Any) -> None:
        """In place of `SubprocessWatchdog._monitor_loop`.

        Args:
            watchdog: Has all child processes of the launcher: the controller, the ranks, the detokenizer.
        """
        processes = dict(zip(watchdog._names, watchdog._processes, strict=True))
        # SGLang counts the controller, which comes first, with the schedulers.
        ranks = [processes[f"scheduler_{rank + 1}"] for rank in range(len(self._watch.states))]
        others = [process for process in processes.values() if process not in ranks]
        while not watchdog._stop_event.is_set():
            connection.wait([p.sentinel for p in (*ranks, *others) if p.exitcode is None], _INTERVAL_S)
            if watchdog._stop_event.is_set():
                return
            changed = self._watch.look(
                {rank: how_it_ended(p.exitcode) for rank, p in enumerate(ranks) if p.exitcode is not None},
                [rank for rank, process in enumerate(ranks) if is_stopped(process.pid)],
                self._beats(),
            )
            for rank, state in changed:
                _log(rank, state, len(ranks))
            is_over = not any(living(self._watch.states)) if self._outlives else not all(living(self._watch.states))
            if is_over or any(process.exitcode for process in others):
                os.kill(os.getpid(), signal.SIGQUIT)
                return
            self._tell()

    def _beats(self) -> list[float | None]:
        """When each rank published its load last. Read without SGLang's lock, which a stopped rank may hold."""
        if not self._loads._attach():
            return [None] * len(self._told)
        loads = [self._loads._read_slot(rank) for rank in range(len(self._told))]
        return [load.timestamp if load else None for load in loads]

    def _tell(self) -> None:
        """Let the tokenizer manager's event loop, which owns its sockets, take in the states, as soon as it runs."""
        states, loop = self._watch.states, self._manager.event_loop
        if states is not self._told and loop is not None:
            self._told = states
            loop.call_soon_threadsafe(self.apply, states)

    def apply(self, states: tuple[RankState, ...]) -> None:
        """Tell the controller and whoever waits for answers of all ranks, and show the status."""
        manager = self._manager
        self._show(states)
        manager._dispatch_to_scheduler(wrap_as_pickle(Notice(states, tuple(manager.rid_to_state))))
        for name, communicator in _communicators(manager):
            answers = sum(serving(states) if name == _QUESTION else living(states))
            communicator.set_fan_out(answers)
            if communicator._result_fan_out is not None and communicator._result_fan_out > answers:
                communicator._result_fan_out = answers
                if len(communicator._result_values) >= answers:
                    communicator._result_event.set()
        manager.model_update_expected_workers = sum(living(states))
        update, answers = manager.model_update_result, manager.model_update_tmp
        if update is not None and not update.done() and 0 < sum(living(states)) <= len(answers):
            update.set_result(answers)

    def check(self, communicator: Any) -> None:
        """See to it that all ranks can take part in a request that needs them.

        One that changes ranks must not be missed by a rank that responds later, and weights that a lost rank stored
        are read by the others.

        Args:
            communicator: By which the request goes to all ranks; None: it updates weights.

        Raises:
            HTTPException: With status 503. They cannot.
        """
        states = self._watch.states
        if all(serving(states)):
            return
        names = {id(one): name for name, one in _communicators(self._manager)}
        name = names.get(id(communicator), _QUESTION) if communicator is not None else "update_weights_from_disk"
        needs_lost = any(part in name for part in _UPDATES)
        if name != _QUESTION and (needs_lost or serving(states) != living(states)):
            why = f"DWDP: {name} needs all ranks: {status(states)}."
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, why)

    def covers(self, watchdog: Any) -> bool:
        """Whether all ranks are child processes of this launcher, which they are on one host."""
        return f"scheduler_{len(self._watch.states)}" in watchdog._names

    def _show(self, states: Sequence[RankState]) -> None:
        self._info[_STATUS] = status(states)
        for condition, gauge in self._gauges.items():
            gauge.set(sum(state.condition is condition for state in states))


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; not one that a debugger looks at for a moment."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _communicators(manager: Any) -> list[tuple[str, Any]]:
    from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS

    return [(spec[0], getattr(manager, f"{spec[0]}_communicator")) for spec in _COMMUNICATOR_SPECS]


def _gauges(manager: Any) -> dict[Condition, Any]:
    if not manager.enable_metrics:
        return {}
    # Not at the top: SGLang first says in which folder its processes share their metrics.
    from prometheus_client import Gauge

    name, text = RANKS
    labels = manager.metrics_collector.labels
    family = Gauge(f"sglang:{name}", text, [*labels, "condition"], multiprocess_mode="mostrecent")
    return {condition: family.labels(**labels, condition=condition.value) for condition in Condition}


def _log(rank: int, state: RankState, size: int) -> None:
    if state.condition is Condition.SERVING:
        logger.info("DWDP: rank %d of %d gets requests again.", rank, size)
    elif state.condition is Condition.SILENT:
        logger.warning("DWDP: rank %d of %d does not respond (%s): it gets no new requests.", rank, size, state.why)
    else:
        logger.error("DWDP: rank %d of %d is lost: its process %s.", rank, size, state.why)


_current: list[RankWatch] = []  # of the server that was started last in this process


def prepare(_result: None, manager: Any, started: Any, *_args: Any) -> None:
    """After `Engine._set_startup_time`: all ranks are ready, and SGLang is about to watch its processes."""
    config, info = config_of(manager.server_args), started.scheduler_infos[0]
    _is_over.set()
    _current.clear()
    if config is not None:
        _current.append(RankWatch(manager, info, info["dp_size"], outlives=config.outlives_ranks))


def monitor(original: Callable[[Any], None], watchdog: Any) -> None:
    """Around `SubprocessWatchdog._monitor_loop`, which a thread runs."""
    watches = _current[:]
    if not watches or not watches[0].covers(watchdog):
        original(watchdog)
        return
    try:
        watches[0].run(watchdog)
    except Exception:
        logger.exception("DWDP: the watch over the ranks failed, so SGLang's own goes on: a lost rank ends the server.")
        original(watchdog)


async def ask_all(original: Callable[..., Any], communicator: Any, *args: Any) -> Any:
    """Around `FanOutCommunicator.__call__`, a request to all ranks."""
    for watch in _current:
        watch.check(communicator)
    return await original(communicator, *args)


async def update_all(original: Callable[..., Any], manager: Any, *args: Any) -> Any:
    """Around `TokenizerManager._wait_for_model_update_from_disk`, which counts answers by itself."""
    for watch in _current:
        watch.check(None)
    return await original(manager, *args)


def watch_start(result: Any, _cls: type, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """After `Engine._launch_scheduler_processes`, until all ranks are ready: one that is killed ends the start.

    SGLang would show what its peers make of that.
    """
    _, processes = result
    _is_over.clear()
    if config_of(server_args) is None or not processes:
        return
    ranks, original = processes[1:], signal.getsignal(signal.SIGQUIT)
    if callable(original) and threading.current_thread() is threading.main_thread():  # else SGLang has no handler
        sglangs = original

        def end(number: int, frame: Any) -> None:
            """A peer may have told first that it failed."""
            _name_killed(ranks)
            sglangs(number, frame)

        signal.signal(signal.SIGQUIT, end)
    threading.Thread(target=_until_ready, args=(ranks,), daemon=True).start()


_is_over = threading.Event()  # the start: all ranks are ready, or one was killed and named
_naming = threading.RLock()


def _until_ready(ranks: Sequence[Any]) -> None:
    while not _is_over.is_set():
        connection.wait([process.sentinel for process in ranks if process.exitcode is None], _INTERVAL_S)
        if _name_killed(ranks):
            os.kill(os.getpid(), signal.SIGQUIT)
            return
        if not any(process.exitcode is None for process in ranks):
            return


def _name_killed(ranks: Sequence[Any]) -> bool:
    """Whether a rank was killed before the server was ready; it is named once."""
    killed = {rank: process for rank, process in enumerate(ranks) if (process.exitcode or 0) < 0}
    # The signal may have come while the main thread logged, for which a thread that has this lock then waits.
    if killed and _naming.acquire(timeout=_INTERVAL_S):
        try:
            if not _is_over.is_set():
                _is_over.set()
                rank, process = min(killed.items())
                how = how_it_ended(process.exitcode)
                logger.error("DWDP: rank %d of %d %s before the server was ready, so it ends.", rank, len(ranks), how)
        finally:
            _naming.release()
    return bool(killed)


HOOKS = (
    Hook("sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes", HookType.AFTER, watch_start),
    Hook("sglang.srt.entrypoints.engine.Engine._set_startup_time", HookType.AFTER, prepare),
    Hook("sglang.srt.utils.watchdog.SubprocessWatchdog._monitor_loop", HookType.AROUND, monitor),
    Hook("sglang.srt.managers.communicator.FanOutCommunicator.__call__", HookType.AROUND, ask_all),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_for_model_update_from_disk",
        HookType.AROUND,
        update_all,
    ),
)
