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


@pytest.mark.parametrize(("replay_us", "joint"), [(4_000.0, True), (12_000.0, False), (14_000.0, False)])
def test_a_prefill_that_is_never_joint_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, replay_us: float, joint: bool
) -> None:
    """What was measured at start stays, and other processes may have disturbed it."""
    monkeypatch.setattr(joint_layers, "_replay_us", lambda _replay, _times=8: replay_us)
    forwards: Any = SimpleNamespace(times=StepTimes((), ()))
    layers = JointLayers(forwards, {}, RowShape(512, 64, 4, torch.float32), "cpu")
    layers._graphs[512] = SimpleNamespace(replay=lambda: None)
    with caplog.at_level("INFO"):
        layers.time_copies(19_300.0)
        layers.time_prefill(512)
    assert forwards.times.is_joint(512) is joint
    assert len(caplog.messages) == (not joint)
    wanted = f"together they would take {1.5 * replay_us / 1000:.1f} ms of all ranks, and by copies 19.3 ms of this"
    assert joint or wanted in caplog.messages[0]


def test_copies_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks measure them together, in the first bucket that is captured."""
    times = {"help": iter((9_000.0, 14_000.0)), "copy": iter((20_000.0,))}
    monkeypatch.setattr(joint_layers, "_replay_us", lambda what, _times=8: next(times[what()]))
    forwards: Any = SimpleNamespace(times=StepTimes((), ()))
    layers = JointLayers(forwards, {}, RowShape(1024, 64, 4, torch.float32), "cpu")
    for bucket in (512, 1024):
        layers._graphs[bucket] = SimpleNamespace(replay=lambda: "help")
        layers.time_copies(lambda: "copy")
        layers.time_prefill(bucket)
    assert forwards.times == StepTimes([(512, 20_000.0), (1024, 20_000.0)], [(512, 13_500.0), (1024, 21_000.0)])


@pytest.mark.parametrize(
    ("timed_us", "copies_us", "expected"),
    [(5_000.0, 20_000.0, 9_270.0), (12_000.0, 20_000.0, 12_000.0), (5_000.0, None, 5_000.0)],
)
def test_a_decode_alone_reads_what_its_tokens_choose(
    monkeypatch: pytest.MonkeyPatch, timed_us: float, copies_us: float | None, expected: float
) -> None:
    """Of 128 experts, 8 tokens that choose 8 each touch 0.403; a graph that is timed may touch fewer."""
    replays = {"alone": timed_us, "joint": 2_500.0}
    monkeypatch.setattr(joint_layers, "_replay_us", lambda what, _times=8: replays[what()])
    forwards: Any = SimpleNamespace(times=StepTimes((), ()))
    layer: Any = SimpleNamespace(table=torch.zeros(129))
    layers = JointLayers(forwards, {0: layer}, RowShape(256, 64, 8, torch.float32), "cpu")
    if copies_us is not None:
        layers.time_copies(copies_us)
    layers.time_decode(8, lambda: "alone", lambda: "joint")
    assert forwards.times.alone_us(8) == pytest.approx(expected, rel=0.001)
    assert forwards.times.joint_us(8) == 2_500
