"""Requests for records of the distribution of experts are answered with an error.

SGLang's recorder sums over ranks, so it is off under DWDP, and being asked for records without one ends a server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook

logger = logging.getLogger(__name__)

_REASON = "Recording the distribution of experts is not supported with --enable-dwdp: it sums over all ranks."


def reject_record(_scheduler: Any, _request: Any) -> Any:
    """In place of `Scheduler.expert_distribution_handle`, whose answer has no room for an error."""
    from sglang.srt.managers.io_struct import ExpertDistributionReqOutput

    logger.error(_REASON)
    return ExpertDistributionReqOutput()


async def explain(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the tokenizer manager's requests for records."""
    if config_of(manager.server_args) is None:
        return await original(manager, *args, **kwargs)
    from fastapi import HTTPException

    raise HTTPException(status_code=400, detail=_REASON)


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
SCHEDULER_HOOKS = (
    Hook("sglang.srt.managers.scheduler.Scheduler.expert_distribution_handle", HookType.REPLACE, reject_record),
)
TOKENIZER_HOOKS = tuple(
    Hook(f"{_MANAGER}.{verb}_expert_distribution_record", HookType.AROUND, explain)
    for verb in ("start", "stop", "dump")
)
