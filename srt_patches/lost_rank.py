"""How far the end of a rank goes: its own process, or the server, with a line that names it.

SGLang's schedulers tell the launcher to end the server when they fail or are stuck. With --dwdp-on-rank-loss continue
they end alone, and the launcher sees to the rest (`rank_watch.py`). Where the server does end, SGLang would first dump
stacks and wait a minute for CUDA core dumps, while requests hang.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import psutil
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook

logger = logging.getLogger(__name__)
FAILED = 70  # exit code of a rank that failed, as in sysexits.h
_STACKS, _CORES = "SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"


def name_lost_ranks(manager: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before `TokenizerManager.dump_requests_before_crash`, the first thing that a failing server does.

    Unless the user asked for dumps, those of cores are left out where CUDA writes none, and those of stacks where a
    rank is gone: they show what the healthy ones do.
    """
    watchdog = manager._subprocess_watchdog
    if watchdog is None or config_of(manager.server_args) is None:
        return
    os.environ.setdefault(_CORES, os.environ.get("CUDA_ENABLE_USER_TRIGGERED_COREDUMP", "0"))
    for name, process in zip(watchdog._names, watchdog._processes, strict=True):
        if process.exitcode:
            # SGLang counts the controller, which comes first, with the schedulers.
            number = int(name.removeprefix("scheduler_")) - 1 if name.startswith("scheduler_") else -1
            logger.error(
                "DWDP: %s (process %d) %s. The server ends: restart it.",
                f"rank {number}" if number >= 0 else f"{name} of SGLang",
                process.pid,
                how_it_ended(process.exitcode),
            )
            os.environ.setdefault(_STACKS, "0")


def how_it_ended(code: int) -> str:
    """The exit code of a process in words; one below 0 is a signal's number."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (is the host out of memory?)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


TOKENIZER_HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.dump_requests_before_crash",
        HookType.BEFORE,
        name_lost_ranks,
    ),
)


def end_alone(original: Callable[[Any], None], scheduler: Any) -> None:
    """Around `Scheduler.run_event_loop`, after whose exceptions SGLang ends the server: end this process only.

    At once: what a device or a link has failed under may never return from an orderly end.
    """
    try:
        original(scheduler)
    except Exception:
        logger.exception("DWDP: this rank failed, and ends. The others serve on.")
        logging.shutdown()
        os._exit(FAILED)


def end_stalled(fills: Sequence[str]) -> None:
    """End this process, whose forward waits for copies that do not end: nothing can be done to them or to it."""
    logger.error("DWDP: copies did not end, so this rank ends: %s.", "; ".join(fills))
    logging.shutdown()
    os._exit(FAILED)


def end_itself(_result: None, watchdog: Any, *_args: Any, **_kwargs: Any) -> None:
    """After `WatchdogRaw.__init__`, whose thread sends a signal to the launcher when a forward takes minutes: to this
    rank instead."""
    watchdog.parent_process = psutil.Process()


OUTLIVED_HOOKS = (
    Hook("sglang.srt.managers.scheduler.Scheduler.run_event_loop", HookType.AROUND, end_alone),
    Hook("sglang.srt.utils.watchdog.WatchdogRaw.__init__", HookType.AFTER, end_itself),
)
