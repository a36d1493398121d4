"""One server under loads that hang lock-step data parallelism, and under requests that it must answer with an error."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from sglang_dwdp.demo.server import Server
from tests.e2e import views
from tests.e2e.conftest import FLAGS, Answers, Plugin, Reference, Running
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family

BUSY_S = 30.0
LIMIT = 64  # tokens of a forward that reads in place


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> views.ViewFile:
    return views.ViewFile(tmp_path_factory.mktemp("view") / "view")


@pytest.fixture(scope="module")
def server(
    running: Running, models: Callable[[Family, int], Path], plugin: Plugin, view: views.ViewFile
) -> Iterator[Server]:
    environment = plugin("view_switch", views.PLUGIN) | view.environment
    dwdp = ("--dwdp-direct-max-tokens", str(LIMIT))
    with running(models("qwen3_moe", 8), 3, dwdp=dwdp, environment=environment) as server:
        yield server


@pytest.fixture(scope="module")
def expected(reference: Reference) -> Answers:
    return reference("qwen3_moe", 8)


def test_staged_and_direct(server: Server, view: views.ViewFile, expected: Answers) -> None:
    """8 experts do not divide evenly among 3 ranks."""
    views.check_staged_and_direct(server, view, expected, LIMIT)


def ask_all(server: Server, expected: Answers, requests_: list[tuple[int, int | None]], at_once: int) -> None:
    """`requests_`: (prompt's number, rank). Sent `at_once` at a time; each must get its own answer."""

    def one(request: tuple[int, int | None]) -> bool:
        number, rank = request
        return server.generate(PROMPTS[number], MAX_NEW_TOKENS, rank) == expected[number]

    with ThreadPoolExecutor(at_once) as pool:
        assert all(pool.map(one, requests_))


def test_requests_that_arrive_on_all_ranks_at_once(server: Server, expected: Answers) -> None:
    ask_all(server, expected, [(number, rank) for number in range(len(PROMPTS)) for rank in range(3)], 24)


def test_200_short_requests(server: Server, expected: Answers) -> None:
    ask_all(server, expected, [(number % 9, None) for number in range(200)], 16)


def test_one_rank_busy_while_the_others_idle(server: Server, expected: Answers) -> None:
    before = server.reports()
    deadline = time.monotonic() + BUSY_S
    turns = 0
    while time.monotonic() < deadline:
        ask_all(server, expected, [(number, 0) for number in (3, 15, 8, 11)], 4)
        turns += 1
    after = server.reports()
    assert turns > 1
    assert after[0]["forward_tokens"] > before[0]["forward_tokens"]
    for rank in (1, 2):  # no idle batch either
        assert after[rank]["forward_tokens"] == before[rank]["forward_tokens"]
        forwards = [sum(r[rank][k] for k in ("direct_forwards", "staged_forwards")) for r in (before, after)]
        assert forwards[0] == forwards[1]
    ask_all(server, expected, [(15, 1), (3, 2)], 2)


def test_a_client_that_disconnects(server: Server, expected: Answers) -> None:
    for rank in range(3):
        body = {
            "text": PROMPTS[12],
            "sampling_params": {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True},
            "stream": True,
            "routed_dp_rank": rank,
        }
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=60) as answer:
            next(answer.iter_lines())
    ask_all(server, expected, [(number, rank) for number in (0, 14) for rank in range(3)], 6)


def test_with_exit_a_rank_that_is_killed_ends_its_server_at_once(
    server: Server,
    expected: Answers,
    models: Callable[[Family, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a second server, on the next port of the host."""
    monkeypatch.setattr("sglang_dwdp.demo.server.free_port", lambda: server.port + 1)
    dwdp = ("--dwdp-on-rank-loss", "exit")
    second = Server(models("qwen3_moe", 8), 2, tmp_path / "log", dwdp=dwdp, flags=FLAGS)
    try:
        second.wait()
        processes = psutil.Process(second.process.pid).children(recursive=True)
        [rank] = [process for process in processes if "TP1" in process.name()]
        rank.kill()
        assert second.process.wait(10) != 0
        log = second.log.read_text()
        assert log.count("DWDP: rank 1 (process") == 1
        assert f"DWDP: rank 1 (process {rank.pid}) was ended by SIGKILL" in log
    finally:
        second.kill()
    ask_all(server, expected, [(4, rank) for rank in range(3)], 3)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/init_weights_send_group_for_remote_instance",
            {"master_address": "127.0.0.1", "ports": "1,2,3", "group_rank": 0, "world_size": 2, "group_name": "g"},
        ),
        (
            "/send_weights_to_remote_instance",
            {"master_address": "127.0.0.1", "ports": "1,2,3", "group_name": "g"},
        ),
    ],
)
def test_requests_for_weights_are_answered_with_an_error(
    server: Server, expected: Answers, path: str, body: dict[str, object]
) -> None:
    """Updates: `test_updates.py`."""
    answer = requests.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "unsupported with --enable-dwdp" in answer.text
    ask_all(server, expected, [(4, rank) for rank in range(3)], 3)


def test_the_server_reports_what_it_does(server: Server, expected: Answers) -> None:
    ask_all(server, expected, [(number, rank) for number in (0, 15) for rank in range(3)], 6)
    info = requests.get(f"{server.url}/server_info", timeout=30).json()
    assert info["dwdp_size"] == 3
    assert info["dp_size"] == 3  # the ranks that a router may name
    assert [report["rank"] for report in server.reports()] == [0, 1, 2]
    for report in server.reports():
        assert report["transport"] == "host-shm"
        assert report["direct_max_tokens"] == LIMIT
        assert report["late_fills"] == 0
        assert report["bytes_copied"] > 0
        assert report["bytes_read_in_place"] > 0


def test_a_launcher_that_is_killed_leaves_nothing(server: Server) -> None:
    """The last test of this server: what may be left is looked at where it stops."""
    server.process.kill()
    assert server.process.wait(10) == -signal.SIGKILL
