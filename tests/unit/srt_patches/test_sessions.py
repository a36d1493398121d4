"""A session has one rank: its turns go there, and that rank says that it is open."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.srt_patches import recorder, sessions
from sglang_dwdp.srt_patches.arguments import attach
from sglang_dwdp.srt_patches.sessions import open_session, rank_of_session, route_turn

CONTROLLER = SimpleNamespace(workers=[None] * 3)


def routed(**fields: Any) -> int | None:
    request = SimpleNamespace(routed_dp_rank=None, **fields)
    seen: list[int | None] = []
    route_turn(lambda _controller, req, **_: seen.append(req.routed_dp_rank), CONTROLLER, request)
    return seen[0]


def test_sessions_spread_over_ranks() -> None:
    counts = Counter(rank_of_session(f"session {number}", 4) for number in range(1000))
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 150


def test_turns_of_a_session_stay_together() -> None:
    expected = rank_of_session("a", 3)
    assert routed(session_params=SimpleNamespace(id="a", rid="1"), session_id=None) == expected
    assert routed(session_params=None, session_id="a") == expected
    assert routed(session_params=SimpleNamespace(id=None), session_id=None) is None  # a new one, unnamed
    assert routed() is None  # a kind of request that has no sessions
    assert routed(session_params=None, session_id=None) is None


def test_a_rank_that_the_client_names_is_kept() -> None:
    request = SimpleNamespace(routed_dp_rank=2, session_params=SimpleNamespace(id="a"))
    route_turn(lambda *_args, **_kwargs: None, CONTROLLER, request)
    assert request.routed_dp_rank == 2


def test_the_sessions_rank_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parallel(SimpleNamespace):
        def override(self, tp_rank: int) -> Any:
            return _Overridden(self, tp_rank)

    class _Overridden:
        def __init__(self, parallel: Parallel, tp_rank: int) -> None:
            self.parallel, self.tp_rank = parallel, tp_rank

        def __enter__(self) -> None:
            self.before, self.parallel.tp_rank = self.parallel.tp_rank, self.tp_rank

        def __exit__(self, *_: object) -> None:
            self.parallel.tp_rank = self.before

    def sglangs(_scheduler: Any, _request: Any) -> str | None:
        return "opened" if parallel.tp_rank == 0 else None

    answers = []
    for rank in range(3):
        parallel = Parallel(tp_rank=rank, tp_size=3)
        monkeypatch.setattr(sessions, "get_parallel", lambda parallel=parallel: parallel)
        answers.append(open_session(sglangs, None, SimpleNamespace(session_id="a")))
        assert parallel.tp_rank == rank
    assert [rank for rank, answer in enumerate(answers) if answer] == [rank_of_session("a", 3)]


async def done(_manager: Any) -> str:
    return "done"


def test_records_of_experts_are_answered_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    arguments = SimpleNamespace(device="cuda", tp_size=2)
    plain = SimpleNamespace(server_args=SimpleNamespace())
    attach(arguments, DwdpConfig())
    with pytest.raises(HTTPException, match="not supported with --enable-dwdp") as error:
        asyncio.run(recorder.explain(done, SimpleNamespace(server_args=arguments)))
    assert error.value.status_code == 400
    assert asyncio.run(recorder.explain(done, plain)) == "done"
    recorder.reject_record(None, None)
    assert "not supported with --enable-dwdp" in caplog.text
