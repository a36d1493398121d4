"""A server of two ranks with sessions: no turn loses the history of the turns before it, and tokens are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_dwdp.demo.server import Server
from sglang_dwdp.experts.direct_limit import direct_limit
from tests.e2e import views
from tests.e2e.conftest import Plugin, Reference, Running
from tests.fixtures.families import Family

TURNS, NEW_TOKENS, SESSIONS = 3, 8, 8
TEXT = "The quick brown fox jumps"


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> views.ViewFile:
    return views.ViewFile(tmp_path_factory.mktemp("view") / "view")


@pytest.fixture(scope="module")
def server(
    running: Running, models: Callable[[Family, int], Path], plugin: Plugin, view: views.ViewFile
) -> Iterator[Server]:
    environment = plugin("view_switch", views.PLUGIN) | view.environment
    flags = ("--enable-streaming-session",)
    with running(models("qwen3_moe", 8), 2, dwdp=(), flags=flags, environment=environment) as server:
        yield server


def test_staged_and_direct(server: Server, view: views.ViewFile, reference: Reference) -> None:
    """8 experts divide evenly among 2 ranks; the limit is DWDP's own."""
    views.check_staged_and_direct(server, view, reference("qwen3_moe", 8), direct_limit(8, 2))


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    answer = requests.post(server.url + path, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json() if answer.content else None


def turns(server: Server, *, streaming: bool) -> list[int]:
    """The prompt's tokens in each turn of a new session that says the same text again and again."""
    session = post(server, "/open_session", {"capacity_of_str_len": 1000, "streaming": streaming})
    counts: list[int] = []
    rid: str | None = None
    for _ in range(TURNS):
        body = {
            "text": TEXT,
            "session_params": {"id": session} | ({} if streaming else {"rid": rid}),
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        }
        info = post(server, "/generate", body)["meta_info"]
        rid = info["id"]
        counts.append(info["prompt_tokens"])
    post(server, "/close_session", {"session_id": session})
    return counts


@pytest.mark.parametrize("streaming", [True, False])
def test_every_turn_has_the_history(server: Server, *, streaming: bool) -> None:
    with ThreadPoolExecutor(SESSIONS) as pool:
        found = list(pool.map(lambda _: turns(server, streaming=streaming), range(SESSIONS)))
    first = found[0][0]
    assert found == [[first + turn * (first + NEW_TOKENS) for turn in range(TURNS)]] * SESSIONS


def test_turns_of_a_chat_without_a_session_find_what_was_computed(server: Server) -> None:
    """Eight chats, whose beginnings differ, one turn after another; each is sent whole, and names no rank."""
    ask = {"sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}}
    chats = [f"Chat {number}. {(TEXT + ', ') * 30}" for number in range(SESSIONS)]
    first = [post(server, "/generate", {"text": chat, **ask}) for chat in chats]
    for chat, answer in zip(chats, first, strict=True):
        info = post(server, "/generate", {"text": chat + answer["text"] + " And then?", **ask})["meta_info"]
        assert info["cached_tokens"] >= answer["meta_info"]["prompt_tokens"] - 1


@pytest.mark.parametrize("verb", ["start", "stop", "dump"])
def test_records_of_experts_are_answered_with_an_error(server: Server, verb: str) -> None:
    answer = requests.post(f"{server.url}/{verb}_expert_distribution_record", timeout=60)
    assert answer.status_code == 400
    assert "not supported with --enable-dwdp" in answer.text
    assert turns(server, streaming=False)
