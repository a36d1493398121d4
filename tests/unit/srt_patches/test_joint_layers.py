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
    monkeypatch.setattr(joint_layers, "_replay_us", lambda _replay: replay_us)
    forwards: Any = SimpleNamespace(times=StepTimes((), ()))
    layers = JointLayers(forwards, {}, RowShape(512, 64, 4, torch.float32), "cpu")
    layers._graphs[512] = SimpleNamespace(replay=lambda: None)
    with caplog.at_level("INFO"):
        layers.time_prefill(512, 19_300.0)
    assert forwards.times.may_save(512) is joint
    assert len(caplog.messages) == (not joint)
    assert joint or "together they would take 21.0 ms, and by copies 19.3 ms" in caplog.messages[0]
