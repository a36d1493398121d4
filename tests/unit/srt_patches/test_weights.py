"""Requests that would change or save weights: answered with an error where DWDP is on, and only there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.srt_patches import weights
from sglang_dwdp.srt_patches.arguments import attach


def manager(config: DwdpConfig | None) -> SimpleNamespace:
    arguments = SimpleNamespace(device="cuda", tp_size=2)
    attach(arguments, config)
    return SimpleNamespace(server_args=arguments)


async def done(_manager: Any, *_args: Any) -> str:
    return "done"


def test_with_dwdp() -> None:
    mine = manager(DwdpConfig())
    assert asyncio.run(weights.refuse_request(done, mine))[0] is False
    refused, reason, paused = asyncio.run(weights.refuse_disk_update(done, mine))
    assert (refused, paused) == (False, 0)
    assert "Restart the server" in reason
    reset = SimpleNamespace(action="reset_tensors")
    assert asyncio.run(weights.refuse_reset(done, mine, reset))[0] is False
    assert asyncio.run(weights.refuse_reset(done, mine, SimpleNamespace(action="compare"))) == "done"
    with pytest.raises(ValueError, match="not supported with --enable-dwdp"):
        asyncio.run(weights.refuse_release(done, mine))


def test_an_engine_without_dwdp_in_the_same_process_is_left_alone() -> None:
    plain = manager(None)
    assert asyncio.run(weights.refuse_request(done, plain)) == "done"
    assert asyncio.run(weights.refuse_disk_update(done, plain)) == "done"
    assert asyncio.run(weights.refuse_release(done, plain)) == "done"
    assert asyncio.run(weights.refuse_reset(done, plain, SimpleNamespace(action="reset_tensors"))) == "done"


def test_remote_calls() -> None:
    answer = weights.refuse_rpc(None, SimpleNamespace(method="save_sharded_model"))
    assert answer.success is False
    assert answer.message.startswith("save_sharded_model is not supported with --enable-dwdp")
