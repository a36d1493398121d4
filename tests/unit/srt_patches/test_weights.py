"""Requests that would change, read or save weights: answered with an error where DWDP is on, and only there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.model_runner_components.weight_exporter import WeightExporter
from sglang.srt.model_executor.model_runner_components.weight_updater import _unsupported_derived_weight_cache_error

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.srt_patches import weights
from sglang_dwdp.srt_patches.arguments import attach


def manager(config: DwdpConfig | None) -> SimpleNamespace:
    arguments = SimpleNamespace(device="cuda", tp_size=2)
    attach(arguments, config)
    return SimpleNamespace(server_args=arguments)


async def done(_manager: Any, *_args: Any) -> str:
    return "done"


def test_sglang_heeds_what_a_model_declares() -> None:
    model = torch.nn.Linear(1, 1)
    exporter = WeightExporter(
        tp_rank=0, tp_size=1, gpu_id=0, get_model_path=lambda: "", get_model=lambda: torch.nn.Sequential(model)
    )
    assert exporter._weight_export_unsupported_reason() is None
    weights.declare_fixed(model)
    assert "Updating weights is not supported" in str(_unsupported_derived_weight_cache_error(model))
    with pytest.raises(RuntimeError, match="not supported with --enable-dwdp"):
        exporter.save_sharded_model("nowhere")
    assert exporter.init_weights_send_group_for_remote_instance("", "1", 0, 1, "g")[0] is False


@pytest.mark.parametrize("explain", [weights.explain_memory, weights.explain_weights])
def test_answers_without_room_for_an_error_are_made_one(explain: Any) -> None:
    with pytest.raises(ValueError, match="not supported with --enable-dwdp"):
        asyncio.run(explain(done, manager(DwdpConfig())))
    assert asyncio.run(explain(done, manager(None))) == "done"  # another engine of the same process


def test_sending_weights() -> None:
    sent, reason = asyncio.run(weights.explain_sending(done, manager(DwdpConfig())))
    assert (sent, "not supported with --enable-dwdp" in reason) == (False, True)
    assert asyncio.run(weights.explain_sending(done, manager(None))) == "done"


@pytest.mark.parametrize("reject", [weights.reject_begin, weights.reject_check])
def test_requests_to_the_ranks(reject: Any) -> None:
    answer = reject(None, None)
    assert answer.success is False
    assert "not supported with --enable-dwdp" in answer.message


def test_memory_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    weights.reject_release(None, None)
    weights.reject_resume(None, None)
    assert caplog.text.count("not supported with --enable-dwdp") == 2


def test_remote_calls() -> None:
    answer = weights.reject_rpc(None, SimpleNamespace(method="save_sharded_model"))
    assert answer.success is False
    assert answer.message.startswith("save_sharded_model is not supported with --enable-dwdp")
