"""A rank runs one small forward before the server is ready, and an error in it says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpRuntimeError, DwdpSetupError
from sglang_dwdp.srt_patches import exchange, first_forward


class Runner:
    """A `ModelRunner`, as far as it is used."""

    device = "cpu"
    spec_algorithm = None
    model = SimpleNamespace()
    kv_index_translator = SimpleNamespace(bind_runner_slots=lambda _batch: None)

    def __init__(self, runtime: Any, error: Exception | None = None, *, is_draft_worker: bool = False) -> None:
        self.runtime, self.error, self.is_draft_worker = runtime, error, is_draft_worker
        self.batches: list[Any] = []

    def forward(self, batch: Any) -> None:
        self.batches.append(batch)
        self.runtime.counted += batch._forward_num_tokens()
        if self.error is not None:
            raise self.error


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    result = SimpleNamespace(counted=0)
    result.reset_counts = lambda: setattr(result, "counted", 0)
    monkeypatch.setattr(first_forward, "current_runtime", lambda: result)
    return result


def test_a_prompt_is_run_that_nothing_counts(runtime: Any) -> None:
    runner = Runner(runtime)
    first_forward.run_first_forward(None, runner)
    [batch] = runner.batches
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.out_cache_loc.tolist() == [0, 0, 0, 0]  # no request's
    assert runtime.counted == 0


def test_with_exchange_steps_it_is_waited_for(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result is none that a scheduler asks for, and waits are for one forward after the other."""
    runner, waited = Runner(runtime), list[int]()
    monkeypatch.setattr(exchange, "_current", [SimpleNamespace(wait=lambda: waited.append(len(runner.batches)))])
    first_forward.run_first_forward(None, runner)
    assert waited == [1]


def test_any_error_names_the_model_and_the_cause(runtime: Any) -> None:
    with pytest.raises(DwdpSetupError, match=r"ValueError\('wrong shape'\)\. SimpleNamespace may be unsupported"):
        first_forward.run_first_forward(None, Runner(runtime, ValueError("wrong shape")))


def test_an_error_of_dwdp_stays_as_it_is(runtime: Any) -> None:
    with pytest.raises(DwdpRuntimeError, match=r"^all_reduce over 2 ranks$"):
        first_forward.run_first_forward(None, Runner(runtime, DwdpRuntimeError("all_reduce over 2 ranks")))


def test_copies_are_watched_when_the_scheduler_is_ready(runtime: Any) -> None:
    watched: list[Any] = []
    runtime.watch_copies = watched.append
    assert first_forward.watch_copies({"status": "ready"}, None) == {"status": "ready"}
    assert watched == [first_forward.end_stalled]


def test_a_draft_model_runs_nothing(runtime: Any) -> None:
    runner = Runner(runtime, is_draft_worker=True)
    first_forward.run_first_forward(None, runner)
    assert not runner.batches
