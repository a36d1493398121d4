"""The times by which a rank chooses between joint forwards and its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.exchange.policy import StepTimes
from sglang_dwdp.srt_patches import joint_layers
from sglang_dwdp.srt_patches.joint_layers import JointLayers


@pytest.mark.parametrize(("replay_us", "joint"), [(4_000.0, True), (14_000.0, False)])
def test_a_prefill_that_is_never_joint_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, replay_us: float, joint: bool
) -> None:
    """What was measured at start stays, and other processes may have disturbed it."""
    monkeypatch.setattr(joint_layers, "_replay_us", lambda _replay, _times=8: replay_us)
    forwards: Any = SimpleNamespace(times=StepTimes((), ()))
    layers = JointLayers(forwards, {}, RowShape(512, 64, 4, torch.float32), "cpu")
    layers._graphs[512] = SimpleNamespace(replay=lambda: None)
    with caplog.at_level("INFO"):
        layers.time_prefill(512, 19_300.0)
    assert forwards.times.may_save(512) is joint
    assert len(caplog.messages) == (not joint)
    assert joint or "together they would take 21.0 ms, and by copies 19.3 ms" in caplog.messages[0]


def test_copies_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks measure them together, in the first bucket that is captured."""
    times = {"help": iter((9_000.0, 14_000.0)), "copy": iter((20_000.0,))}
    monkeypatch.setattr(joint_layers, "_replay_us", lambda what, _times=8: next(times[what()]))
    forwards: Any = SimpleNamespace(times=StepTimes((), ()))
    layers = JointLayers(forwards, {}, RowShape(1024, 64, 4, torch.float32), "cpu")
    for bucket in (512, 1024):
        layers._graphs[bucket] = SimpleNamespace(replay=lambda: "help")
        layers.time_prefill(bucket, lambda: "copy")
    assert forwards.times == StepTimes([(512, 20_000.0), (1024, 20_000.0)], [(512, 13_500.0), (1024, 21_000.0)])
