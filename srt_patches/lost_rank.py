"""A rank that is lost ends the server at once, with a line that names it.

SGLang's launcher notices it within a second, but dumps stacks and waits a minute for CUDA core dumps before it ends the
server. Until then requests hang, also those of healthy ranks.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook

logger = logging.getLogger(__name__)
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
                "DWDP: %s (process %d) %s. Ranks read each other's experts, so the server ends: restart it.",
                f"rank {number}" if number >= 0 else f"{name} of SGLang",
                process.pid,
                how_it_ended(process.exitcode),
            )
            os.environ.setdefault(_STACKS, "0")


def how_it_ended(code: int) -> str:
    """The exit code of a process in words; one below 0 is a signal's number."""
    if code > 0:
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
