"""Three ranks under load, of which one is stopped, and two are killed one after the other."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from sglang_dwdp.demo.server import Server, ServerFailed
from tests.e2e.conftest import Answers, Plugin, Reference, Running
from tests.e2e.load import RETRY, RIGHT, Held, Load, rank_process
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family

Models = Callable[[Family, int], Path]
CLIENTS = 8
USUAL_S = 8.0  # under load, before anything happens
STOPPED_S = 6.0
AFTER_S = 6.0
SLACK_S = 5.0  # that a request may take longer than usual

DYING = """
import os, signal

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def die(*args, **kwargs):
        from sglang.srt.runtime_context import get_parallel
        if get_parallel().tp_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", die, HookType.AFTER)
"""


@pytest.fixture(scope="module")
def expected(reference: Reference) -> Answers:
    return reference("qwen3_moe", 8)


@pytest.fixture(scope="module")
def server(running: Running, models: Models) -> Iterator[Server]:
    with running(models("qwen3_moe", 8), 3, flags=("--enable-metrics",)) as server:
        yield server


def ranks(server: Server) -> str:
    status: str = requests.get(f"{server.url}/server_info", timeout=10).json()["dwdp_ranks"]
    return status


def wait_for(server: Server, text: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not re.search(text, found := ranks(server)):
        assert time.monotonic() < deadline, f"{found}, not {text}"
        time.sleep(0.1)


@contextmanager
def health(server: Server) -> Iterator[None]:
    """/health is 200 all the time."""
    over, codes = threading.Event(), []

    def ask() -> None:
        while not over.wait(0.5):
            codes.append(requests.get(f"{server.url}/health", timeout=30).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert set(codes) == {200}


def usual_s(load: Load) -> float:
    """Let the load run for a while; the longest that a request took."""
    time.sleep(USUAL_S)
    answers = list(load.answers)
    assert len(answers) > CLIENTS
    assert {answer.what for answer in answers} == {RIGHT}
    return max(answer.seconds for answer in answers)


def test_a_stopped_rank_gets_no_requests_until_it_goes_on(server: Server, expected: Answers) -> None:
    with health(server), Load(server, expected, clients=CLIENTS) as load:
        usual = usual_s(load)
        rank_process(server, 2).send_signal(signal.SIGSTOP)
        wait_for(server, "^degraded: rank 2 of 3 not responding since .* .its process is stopped.$", 3)
        noticed = time.monotonic()
        time.sleep(STOPPED_S)
        body = {"text": PROMPTS[0], "sampling_params": {"max_new_tokens": 1}, "routed_dp_rank": 2}
        named = requests.post(f"{server.url}/generate", json=body, timeout=5)
        flush = requests.post(f"{server.url}/flush_cache", timeout=5)
        gone_on = time.monotonic()
        rank_process(server, 2).send_signal(signal.SIGCONT)
        wait_for(server, "^3 of 3 ranks serve$", 3)
        time.sleep(AFTER_S)
    assert named.status_code == flush.status_code == 503
    assert "rank 2 is not responding" in named.text
    assert "rank 2 of 3 not responding" in flush.text
    assert {answer.what for answer in load.answers} == {RIGHT}  # also of those that it had
    meanwhile = load.between(noticed, gone_on)
    assert {answer.rank for answer in meanwhile} <= {0, 1}
    assert max(answer.seconds for answer in meanwhile) < usual + SLACK_S
    assert 2 in {answer.rank for answer in load.between(gone_on)}


def test_clients_that_leave_cost_no_descriptors_and_no_mappings(server: Server, expected: Answers) -> None:
    pids = [rank_process(server, rank).pid for rank in range(3)]
    before = [Held.by(pid) for pid in pids]
    assert all(held.mappings > 0 for held in before)
    with Load(server, expected, clients=CLIENTS, abort_share=0.5) as load:
        time.sleep(AFTER_S)
    assert {answer.what for answer in load.answers} == {RIGHT}
    assert [Held.by(pid) for pid in pids] == before


@pytest.mark.parametrize("rank", [1, 0])  # 0: its process has what SGLang's ranks met through
def test_the_others_outlive_a_rank(server: Server, expected: Answers, rank: int) -> None:
    survivor = rank_process(server, 2).pid
    held = Held.by(survivor)
    with health(server), Load(server, expected, clients=CLIENTS) as load:
        usual = usual_s(load)
        killed = time.monotonic()
        rank_process(server, rank).kill()
        wait_for(server, rf"rank {rank} of 3 lost at 20.* .was ended by SIGKILL", 3)
        noticed = time.monotonic()
        time.sleep(AFTER_S)
    now = Held.by(survivor)
    assert (now.mappings, now.shared_bytes) == (held.mappings, held.shared_bytes)  # those of the lost rank's memory too
    assert now.descriptors <= held.descriptors  # connections with it are closed
    whats = [answer.what for answer in load.answers]
    assert set(whats) <= {RIGHT, RETRY}
    assert whats.count(RETRY) <= CLIENTS  # those that it had
    assert all(answer.what == RIGHT for answer in load.between(noticed))
    after = load.between(killed)
    assert {answer.rank for answer in load.between(noticed)} == {answer.rank for answer in after} - {rank, -1}
    assert max(answer.seconds for answer in load.answers) < usual + SLACK_S
    body = {"text": PROMPTS[0], "sampling_params": {"max_new_tokens": 1}, "routed_dp_rank": rank}
    named = requests.post(f"{server.url}/generate", json=body, timeout=5)
    assert (named.status_code, f"rank {rank} is lost" in named.text) == (503, True)
    chunk = requests.post(f"{server.url}/generate", json=body | {"stream": True}, timeout=5)
    assert f"rank {rank} is lost" in chunk.text
    assert requests.post(f"{server.url}/flush_cache", params={"timeout": 10}, timeout=20).status_code == 200


def test_what_the_server_says_of_two_lost_ranks(server: Server, expected: Answers) -> None:
    assert ranks(server).count(" lost at ") == 2
    assert len(server.reports()) == 1
    assert server.generate(PROMPTS[15], MAX_NEW_TOKENS) == expected[15]
    text = requests.get(f"{server.url}/metrics", timeout=10).text
    numbers = dict(re.findall(r'^sglang:dwdp_ranks\{condition="([^"]+)".*\} ([\d.]+)$', text, re.MULTILINE))
    assert numbers == {"serving": "1.0", "not responding": "0.0", "lost": "2.0"}
    updated = requests.post(f"{server.url}/update_weights_from_disk", json={"model_path": "elsewhere"}, timeout=10)
    assert updated.status_code == 503
    log = server.log.read_text(errors="replace")
    assert log.count("is lost: its process was ended by SIGKILL") == 2
    assert log.count("gets requests again") == 1


def test_a_rank_that_dies_before_it_meets_the_others_ends_the_start(
    models: Models, plugin: Plugin, tmp_path: Path
) -> None:
    """Its peers fail too, within milliseconds, and may tell first."""
    environment = plugin("dying", DYING)
    server = Server(models("qwen3_moe", 8), 3, tmp_path / "log", dwdp=(), environment=environment)
    try:
        with pytest.raises(ServerFailed, match="the server ended with exit code"):
            server.wait()
    finally:
        server.kill()
    assert server.log.read_text(errors="replace").count("DWDP: rank 1 of 3 was ended by SIGKILL") == 1
