"""A server between two GPUs under load: its weights change, a rank is stopped, and a rank is killed.

python -m pytest -m "gpus and models" tests/gpu/test_faults.py
"""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from benchmarks.variants import QUIET
from sglang_dwdp.demo.server import Server
from tests.e2e.load import RETRY, RIGHT, Load, rank_process
from tests.e2e.prompts import PROMPTS
from tests.fixtures.families import make_checkpoint
from tests.gpu.cases import BASE

pytestmark = [pytest.mark.gpus(2), pytest.mark.models]
RANKS, CLIENTS, UPDATES, NEW_TOKENS = 2, 8, 20, 4
USUAL_S, STOPPED_S, AFTER_S, SLACK_S = 5.0, 20.0, 10.0, 5.0
# Large enough that decoding together is the faster way, or else ranks would never choose it.
SHAPE = {**BASE, "num_layers": 2, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "top_k": 8}
FLAGS = (
    *("--mem-fraction-static", "0.9", "--max-total-tokens", "32768", "--random-seed", "1"),
    *("--cuda-graph-bs-decode", "1", "2", "4", "8", "--cuda-graph-bs-prefill", "64", "256", "1024"),
)
CANDIDATES, CHOSEN = 400, 12
Tokens = list[list[int]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("old", "new")):
        make_checkpoint(folder / name, seed=seed, **SHAPE)
    return folder / "old", folder / "new"


@pytest.fixture(params=["off", "auto"])
def server(request: pytest.FixtureRequest, models: tuple[Path, Path], tmp_path: Path) -> Iterator[Server]:
    environment = {**QUIET, "HF_HUB_OFFLINE": "1", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    dwdp = ("--dwdp-exchange", request.param)
    server = Server(models[0], RANKS, tmp_path / "log", dwdp=dwdp, flags=FLAGS, environment=environment, device="cuda")
    try:
        server.wait()
        yield server
        server.stop()
    finally:
        server.kill()


def update(server: Server, model: Path) -> None:
    answer = server.post("/update_weights_from_disk", {"model_path": str(model)})
    assert answer["success"], answer


def answers(server: Server, prompts: Sequence[str]) -> list[tuple[list[int], float]]:
    """Tokens after each prompt, and the smallest distance of the two best log-probabilities among them."""
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
    asked = {"text": list(prompts), "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 2}
    found = []
    for answer in server.post("/generate", asked):
        best = answer["meta_info"]["output_top_logprobs"]
        found.append((answer["output_ids"], min(first[0] - second[0] for first, second in best)))
    return found


def clear_prompts(server: Server, models: tuple[Path, Path]) -> tuple[list[str], Tokens, Tokens]:
    """Those whose tokens rounding cannot change, whatever else is in a batch: prompts, and tokens of each model."""
    words, draw = " ".join(PROMPTS).split(), random.Random(0)
    candidates = [" ".join(draw.sample(words, draw.randrange(1, 200))) for _ in range(CANDIDATES)]
    update(server, models[1])
    new = answers(server, candidates)
    update(server, models[0])
    old = answers(server, candidates)
    gaps = [min(one[1], other[1]) for one, other in zip(old, new, strict=True)]
    chosen = sorted(range(CANDIDATES), key=lambda number: -gaps[number])[:CHOSEN]
    found = [candidates[i] for i in chosen], [old[i][0] for i in chosen], [new[i][0] for i in chosen]
    assert all(one != other for one, other in zip(found[1], found[2], strict=True))
    return found


def change_weights(server: Server, models: tuple[Path, Path], prompts: list[str], old: Tokens, new: Tokens) -> None:
    """Each completion under load is one of the models', and after an update the new one's."""
    over = threading.Event()

    def ask(client: int) -> int:
        draw, asked = random.Random(client), 0
        while not over.is_set():
            number = draw.randrange(len(prompts))
            assert server.generate(prompts[number], NEW_TOKENS) in (old[number], new[number])
            asked += 1
        return asked

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask, client) for client in range(CLIENTS)]
        try:
            for number in range(UPDATES):
                update(server, models[(number + 1) % 2])
                assert server.generate(prompts[0], NEW_TOKENS, number % RANKS) == (new, old)[number % 2][0]
        finally:
            over.set()
    assert all(client.result() for client in clients)


def wait_for(server: Server, text: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not re.search(text, found := requests.get(f"{server.url}/server_info", timeout=10).json()["dwdp_ranks"]):
        assert time.monotonic() < deadline, f"{found}, not {text}"
        time.sleep(0.1)


def test_it_serves_on(server: Server, models: tuple[Path, Path]) -> None:
    prompts, old, new = clear_prompts(server, models)
    change_weights(server, models, prompts, old, new)
    reports = server.reports()
    assert [report["weight_updates"] for report in reports] == [UPDATES + 2] * RANKS
    joint = "joint_rounds" in reports[0]
    assert not joint or min(report["joint_rounds"] for report in reports) > 0
    assert all(report["late_fills"] == 0 for report in reports)
    with Load(server, old, prompts=prompts, clients=CLIENTS, new_tokens=NEW_TOKENS) as load:
        time.sleep(USUAL_S)
        assert {answer.what for answer in load.answers} == {RIGHT}
        usual = max(answer.seconds for answer in load.answers)
        rank_process(server, 1).send_signal(signal.SIGSTOP)
        wait_for(server, "^degraded: rank 1 of 2 not responding", 5)
        stopped = time.monotonic()
        time.sleep(STOPPED_S)
        rank_process(server, 1).send_signal(signal.SIGCONT)
        gone_on = time.monotonic()
        wait_for(server, "^2 of 2 ranks serve$", 5)
        time.sleep(AFTER_S)
    whats = [answer.what for answer in load.answers]
    # A joint forward that a rank has left ends its requests; without one even those of the stopped rank go on.
    assert set(whats) <= ({RIGHT, RETRY} if joint else {RIGHT}), set(whats)
    assert whats.count(RETRY) <= CLIENTS
    meanwhile = load.between(stopped + 1, gone_on)
    assert {answer.rank for answer in meanwhile} == {0}
    assert max(answer.seconds for answer in meanwhile) < usual + SLACK_S
    assert 1 in {answer.rank for answer in load.between(gone_on)}

    with Load(server, old, prompts=prompts, clients=CLIENTS, new_tokens=NEW_TOKENS) as load:
        time.sleep(USUAL_S)
        rank_process(server, 1).kill()
        wait_for(server, "rank 1 of 2 lost at 20", 5)
        noticed = time.monotonic()
        time.sleep(AFTER_S)
    whats = [answer.what for answer in load.answers]
    assert set(whats) <= {RIGHT, RETRY}, set(whats)
    assert whats.count(RETRY) <= CLIENTS
    after = load.between(noticed)
    assert len(after) > CLIENTS
    assert {answer.what for answer in after} == {RIGHT}
    assert {answer.rank for answer in after} == {0}
    assert max(answer.seconds for answer in load.answers) < usual + SLACK_S
    print(f"{len(whats)} answers around the kill, {whats.count(RETRY)} of 503, longest {usual:.2f} s before")  # noqa: T201
