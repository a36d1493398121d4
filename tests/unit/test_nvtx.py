"""Ranges around waits and fetches, named by layer, only where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.nvtx import VARIABLE
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import PlainLayer, checkpoint, equal, forward, run_ranks


@pytest.mark.parametrize("value", ["1", "0", None])
def test_ranges(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    monkeypatch.setattr("torch.cuda.nvtx.range", noted)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    full = checkpoint(2, 6, {"w": (32, 64)})  # layers 1 and 4

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        return equal(forward(runtime, layers, 1000), full) and equal(forward(runtime, layers, 1), full)

    assert run_ranks(2, full, step, DwdpConfig(depth=1, timeout_s=20)) == [True, True]
    names = [f"dwdp {what} layer {layer}" for layer in (1, 4) for what in ("wait", "fetch after")]
    assert sorted(seen) == sorted(2 * names if value == "1" else [])
