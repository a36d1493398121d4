"""Requests that servers get before anything is measured."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from benchmarks.serving import tokens
from benchmarks.serving.deployment import Deployment


def test_warm_up_covers_every_size_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | None, int]] = []
    busy, most, lock = {0: 0, 1: 0}, {0: 0, 1: 0}, threading.Lock()
    together = threading.Barrier(2 * 10, timeout=20)

    def one(_deployment: Any, prompt: list[int], new_tokens: int, rank: int, _timeout_s: float) -> list[int]:
        with lock:
            seen.append((rank, len(prompt)))
            busy[rank] += 1
            most[rank] = max(most[rank], busy[rank])
        if new_tokens == 16:
            together.wait()  # breaks unless all are in flight
        else:
            assert busy[rank] == 1
        with lock:
            busy[rank] -= 1
        assert all(0 <= token < 2048 for token in prompt)
        return [0] * new_tokens

    monkeypatch.setattr(tokens, "_one", one)
    tokens.warm_up(Deployment("url", "url", 2, {}), 20, 32, 2048, 30)
    lengths = [1, 2, 4, 8, 16, 20]
    more = 4 * [20]  # a whole chunk twice over
    assert sorted(seen) == sorted((rank, length) for rank in (0, 1) for length in 2 * lengths + more)
    assert most == {0: 10, 1: 10}


def test_a_router_picks_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []
    monkeypatch.setattr(tokens, "_one", lambda _d, prompt, _n, rank, _t: seen.append(rank) or prompt)
    assert tokens.generate(Deployment("router", "prefill", 2, {}), [[1], [2]], 4, 30) == [[[1], [2]]]
    assert seen == [None, None]
