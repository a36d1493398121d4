"""Requests that would save, send or release weights: answered with an error where DWDP is on, and only there."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.model_runner_components.weight_exporter import WeightExporter

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.srt_patches import weights
from sglang_dwdp.srt_patches.arguments import attach

UNSUPPORTED = "unsupported with --enable-dwdp"


def manager(config: DwdpConfig | None, nnodes: int = 1, algorithm: str | None = None) -> SimpleNamespace:
    arguments = SimpleNamespace(device="cuda", tp_size=2, nnodes=nnodes, speculative_algorithm=algorithm)
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
    weights.declare_unexportable(model)
    with pytest.raises(RuntimeError, match=UNSUPPORTED):
        exporter.save_sharded_model("nowhere")
    assert exporter.init_weights_send_group_for_remote_instance("", "1", 0, 1, "g")[0] is False


@pytest.mark.parametrize("tags", [None, [], ["weights"], ["kv_cache", "weights"]])
def test_memory_whose_addresses_cannot_be_had_again_is_kept(tags: list[str] | None) -> None:
    request = SimpleNamespace(tags=tags)
    with pytest.raises(ValueError, match=UNSUPPORTED):
        asyncio.run(weights.explain_memory(done, manager(DwdpConfig(transport="cuda-ipc")), request))
    with pytest.raises(ValueError, match="several hosts"):
        asyncio.run(weights.explain_memory(done, manager(DwdpConfig(), nnodes=2), request))
    with pytest.raises(ValueError, match="with --speculative-algorithm"):
        asyncio.run(weights.explain_memory(done, manager(DwdpConfig(), algorithm="EAGLE"), request))
    for config in (DwdpConfig(), None):
        assert asyncio.run(weights.explain_memory(done, manager(config), request)) == "done"


@pytest.mark.parametrize("tags", [["kv_cache"], ["kv_cache", "cuda_graph"]])
def test_other_memory_is_released_as_sglang_does_it(tags: list[str]) -> None:
    request = SimpleNamespace(tags=tags)
    config = DwdpConfig(transport="cuda-ipc")
    assert asyncio.run(weights.explain_memory(done, manager(config), request)) == "done"


class Runtime:
    """What of a runtime is called here."""

    def __init__(self) -> None:
        self.is_released = False
        self.weights = self
        self.on_gpu = False
        self.calls: list[str] = []

    def release(self) -> None:
        self.calls.append("release")
        self.is_released = True

    def restore(self, exchange: str) -> None:
        self.calls.append(f"restore with {exchange}")
        self.is_released = False


def test_experts_are_released_after_all_ranks_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    updates = SimpleNamespace(runtime=runtime, meeting=lambda *, of_group: nullcontext("the group" if of_group else ""))
    monkeypatch.setattr(weights, "current_updates", lambda: updates)

    def original(manager: str, _request: Any) -> str:
        if manager == "to release":
            torch.get_device_module().synchronize()
        runtime.calls.append("SGLang")
        return "done"

    for tags in (["kv_cache"], None, ["weights"]):  # the last one is released already
        assert weights.release_memory(original, "to release", SimpleNamespace(tags=tags)) == "done"
    for tags in (["kv_cache"], ["weights"], ["weights"]):
        assert (
            weights.resume_memory(lambda *_: runtime.calls.append("SGLang") or "done", None, SimpleNamespace(tags=tags))
            == "done"
        )
    released = ["SGLang", "SGLang", "release", "SGLang"]
    assert runtime.calls == [*released, "SGLang", "restore with the group", "SGLang", "SGLang"]


@pytest.mark.parametrize(("found", "fails"), [([None, None], True), ([[1.0], [1.0]], False)])
def test_nothing_that_could_be_read_is_an_error(found: list[Any], fails: bool) -> None:
    async def read(_manager: Any, _request: Any) -> list[Any]:
        return found

    request = SimpleNamespace(name="w")
    assert asyncio.run(weights.explain_reading(read, manager(None), request)) == found
    with pytest.raises(ValueError, match="w cannot be read") if fails else nullcontext():
        assert asyncio.run(weights.explain_reading(read, manager(DwdpConfig()), request)) == found


def test_sending_weights() -> None:
    sent, reason = asyncio.run(weights.explain_sending(done, manager(DwdpConfig())))
    assert (sent, UNSUPPORTED in reason) == (False, True)
    assert asyncio.run(weights.explain_sending(done, manager(None))) == "done"


def test_remote_calls() -> None:
    answer = weights.reject_rpc(None, SimpleNamespace(method="save_sharded_model"))
    assert answer.success is False
    assert answer.message.startswith("save_sharded_model: ")
    assert UNSUPPORTED in answer.message
