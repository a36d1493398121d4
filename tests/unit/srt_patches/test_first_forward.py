"""A rank runs one small forward before the server is ready, and an error in it says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpRuntimeError, DwdpSetupError
from sglang_dwdp.metrics import Counters
from sglang_dwdp.srt_patches import first_forward


class Runtime:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.counters = Counters()

    def begin_forward(self, num_tokens: int) -> None:
        self.calls.append(f"begin {num_tokens}")

    def prime(self) -> None:
        self.calls.append("prime")

    def end_forward(self, num_tokens: int) -> None:
        self.calls.append(f"end {num_tokens}")
        self.counters.count_forward(num_tokens, direct=True)

    def abort_forward(self) -> None:
        self.calls.append("abort")


def start(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, *, draft: bool = False) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(first_forward, "current_runtime", lambda: runtime)

    def dummy_run(run_ctx: Any, **_how: Any) -> None:
        runtime.calls.append("barrier")
        with run_ctx:
            runtime.calls.append("model")
            if error is not None:
                raise error

    eager = SimpleNamespace(_dummy_run=dummy_run, _alloc_dummy_decode_buffers=lambda *_args, **_kwargs: None)
    runner = SimpleNamespace(eager_runner=eager, is_draft_worker=draft, model=SimpleNamespace())
    try:
        first_forward.run_first_forward(None, runner)
    finally:
        assert runtime.calls[-1:] != ["model"], "the forward was left open"
    return runtime


def test_the_forward_is_announced_after_sglangs_barrier_and_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = start(monkeypatch)
    assert runtime.calls == ["barrier", "begin 4", "prime", "model", "end 4"]
    assert runtime.counters == Counters()


def test_any_error_names_the_model_and_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DwdpSetupError, match=r"ValueError: wrong shape\. SimpleNamespace may be unsupported"):
        start(monkeypatch, ValueError("wrong shape"))


def test_an_error_of_dwdp_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DwdpRuntimeError, match=r"^all_reduce over 2 ranks$"):
        start(monkeypatch, DwdpRuntimeError("all_reduce over 2 ranks"))


def test_a_draft_model_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(monkeypatch, draft=True).calls == []
