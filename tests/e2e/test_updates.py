"""New weights while a server serves: each completion is the old or the new model's, and what fails changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from sglang_dwdp.demo.server import Server, free_port
from tests.e2e.conftest import Answers, Reference, Running
from tests.e2e.load import Held, rank_process
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family, make_checkpoint
from tests.fixtures.reference import greedy_tokens

RANKS = 2
UPDATES = int(os.environ.get("DWDP_TEST_UPDATES", "6"))
_KEPT = "old ones serve on"
ASKED = (0, 5, 9, 14)  # of the prompts, where all would take long


@pytest.fixture(scope="module")
def old(models: Callable[[Family, int], Path]) -> Path:
    return models("qwen3_moe", 9)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("new")
    make_checkpoint(directory, seed=1, dtype=torch.float32, num_experts=9)
    return directory


@pytest.fixture(scope="module")
def answers(new: Path, old: Path, reference: Reference) -> dict[Path, Answers]:
    """Of both models."""
    known = {old: reference("qwen3_moe", 9), new: greedy_tokens(new, PROMPTS, MAX_NEW_TOKENS)}
    assert all(a != b for a, b in zip(known[old], known[new], strict=True))
    return known


@pytest.fixture(scope="module")
def server(running: Running, old: Path) -> Iterator[Server]:
    # Staged and direct forwards, replicas of peers' experts, and experts that do not divide evenly.
    dwdp = ("--dwdp-direct-max-tokens", "64", "--dwdp-local-experts", "6", "--dwdp-timeout-s", "60")
    with running(old, RANKS, dwdp=dwdp) as server:
        yield server


def post(server: Server, path: str, **body: Any) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=120)


def succeeds(answer: requests.Response) -> None:
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"], answer.text


def fails(answer: requests.Response, *reasons: str) -> None:
    assert answer.status_code == 400, answer.text
    for reason in reasons:
        assert reason in answer.text, answer.text


def serves(server: Server, expected: Answers) -> None:
    """Every rank gives the tokens of one model."""
    requests_ = [(number, rank) for number in ASKED for rank in range(RANKS)]
    with ThreadPoolExecutor(len(requests_)) as pool:
        found = list(
            pool.map(lambda request: server.generate(PROMPTS[request[0]], MAX_NEW_TOKENS, request[1]), requests_)
        )
    assert found == [expected[number] for number, _ in requests_]


def test_updates_from_disk_under_load(server: Server, old: Path, new: Path, answers: dict[Path, Answers]) -> None:
    """8 clients ask all the time, also while weights change."""
    is_over = threading.Event()
    before = server.reports()

    def ask(client: int) -> int:
        draw, asked = random.Random(client), 0
        while not is_over.is_set():
            number = draw.randrange(len(PROMPTS))
            tokens = server.generate(PROMPTS[number], MAX_NEW_TOKENS)
            assert tokens in (answers[old][number], answers[new][number]), PROMPTS[number][:60]
            asked += 1
        return asked

    with ThreadPoolExecutor(8) as pool:
        clients: list[Future[int]] = [pool.submit(ask, client) for client in range(8)]
        try:
            for update in range(UPDATES):
                model = (new, old)[update % 2]
                succeeds(post(server, "/update_weights_from_disk", model_path=str(model)))
                # What is asked from now on is the new model's.
                assert server.generate(PROMPTS[9], MAX_NEW_TOKENS, update % RANKS) == answers[model][9]
        finally:
            is_over.set()
    assert all(client.result() for client in clients)
    serves(server, answers[(old, new)[UPDATES % 2]])
    for was, report in zip(before, server.reports(), strict=True):
        assert report["weight_updates"] == was["weight_updates"] + UPDATES
        assert report["late_fills"] == was["late_fills"]
        assert report["staged_forwards"] > was["staged_forwards"]
        assert report["direct_forwards"] > was["direct_forwards"]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def without(path: Path, checkpoint: Path, name: str) -> Path:
    """A checkpoint that lacks a tensor."""
    shutil.copytree(checkpoint, path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file, {"format": "pt"})
    return path


def test_what_cannot_be_loaded_changes_nothing(
    server: Server, old: Path, new: Path, answers: dict[Path, Answers], tmp_path: Path
) -> None:
    succeeds(post(server, "/update_weights_from_disk", model_path=str(old)))
    update = "/update_weights_from_disk"
    (tmp_path / "empty").mkdir()
    fails(post(server, update, model_path=str(tmp_path / "empty")), _KEPT, "rank 0: ", "rank 1: ")
    wider = tmp_path / "wider"
    make_checkpoint(wider, dtype=torch.float32, num_experts=9, moe_intermediate_size=160)
    fails(post(server, update, model_path=str(wider)), _KEPT, "moe_intermediate_size 88 and 160")
    # Expert 8 is rank 1's: rank 0 has all that it needs, and takes nothing either.
    name = "model.layers.1.mlp.experts.8.down_proj.weight"
    answer = post(server, update, model_path=str(without(tmp_path / "a", new, name)))
    fails(answer, _KEPT, "rank 1: ", "w2 of experts 8 did not arrive")
    assert "rank 0: " not in answer.text
    name = "model.layers.0.input_layernorm.weight"
    fails(post(server, update, model_path=str(without(tmp_path / "b", new, name))), _KEPT, name)
    serves(server, answers[old])
    assert requests.get(f"{server.url}/get_model_info", timeout=30).json()["model_path"] == str(old)


def checksums(server: Server) -> list[dict[str, Any]]:
    """Of each rank's weights, as each rank tells them."""
    found: list[dict[str, Any]] = post(server, "/weights_checker", action="checksum").json()["ranks"]
    return found


def test_values_that_are_read(server: Server, old: Path, new: Path) -> None:
    weights = tensors_of(new)
    succeeds(post(server, "/update_weights_from_disk", model_path=str(new)))
    norm = post(server, "/get_weights_by_name", name="model.norm.weight", truncate_size=5).json()
    assert norm == [weights["model.norm.weight"][:5].tolist()] * RANKS
    name = "model.layers.1.mlp.experts.w2_weight"
    experts = post(server, "/get_weights_by_name", name=name, truncate_size=9).json()
    expected = [weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].tolist() for expert in range(9)]
    for rank in range(RANKS):
        width = len(expected[0][0])
        assert [[row[:width] for row in expert] for expert in experts[rank]] == expected
    fails(post(server, "/get_weights_by_name", name="model.nothing"), "model.nothing cannot be read")

    first = checksums(server)
    assert len(first) == RANKS * RANKS  # each rank answers for all
    by_rank = {rank["parallelism_info"][0]["tp_rank"]: rank["checksums"] for rank in first}
    assert by_rank[0]["model.norm.weight"] == by_rank[1]["model.norm.weight"]
    assert by_rank[0][name] != by_rank[1][name]  # of the experts that a rank stores
    server.generate(PROMPTS[15], 1, 0)  # a staged forward
    assert checksums(server) == first
    succeeds(post(server, "/update_weights_from_disk", model_path=str(old)))
    assert checksums(server) != first
    succeeds(post(server, "/update_weights_from_disk", model_path=str(new)))
    assert checksums(server) == first


def test_reset(server: Server, old: Path, answers: dict[Path, Answers]) -> None:
    """What RL frameworks check their updates with. (SGLang's comparison with the snapshot needs a GPU.)"""
    succeeds(post(server, "/update_weights_from_disk", model_path=str(old)))
    before = checksums(server)
    succeeds(post(server, "/weights_checker", action="snapshot"))
    succeeds(post(server, "/weights_checker", action="reset_tensors"))
    changed = checksums(server)
    for was, now in zip(before, changed, strict=True):
        same = {name for name, found in was["checksums"].items() if now["checksums"][name] == found}
        assert not [name for name in same if "weight" in name]
    assert server.generate(PROMPTS[9], MAX_NEW_TOKENS, 0) != answers[old][9]
    succeeds(post(server, "/update_weights_from_disk", model_path=str(old)))
    assert checksums(server) == before
    serves(server, answers[old])


@pytest.fixture
def shared_by_name() -> Iterator[None]:
    """Tensors travel to processes that are no children of this one."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.usefixtures("shared_by_name")
def test_updates_from_tensors(server: Server, old: Path, new: Path, answers: dict[Path, Answers]) -> None:
    """Several calls make one update: until its end the old weights serve, also beside requests."""
    from sglang.srt.utils import MultiprocessingSerializer

    def send(tensors: dict[str, torch.Tensor]) -> requests.Response:
        payload = MultiprocessingSerializer.serialize(list(tensors.items()), output_str=True)
        return post(server, "/update_weights_from_tensor", serialized_named_tensors=[payload] * RANKS)

    weights = tensors_of(new)
    names = list(weights)
    buckets = [names[: len(names) // 2], names[len(names) // 2 :]]
    succeeds(post(server, "/update_weights_from_disk", model_path=str(old)))
    fails(send({}), "begin_weight_update()")
    succeeds(post(server, "/begin_weight_update"))
    fails(post(server, "/begin_weight_update"), "already open")
    for bucket in buckets:
        succeeds(send({name: weights[name] for name in bucket}))
        serves(server, answers[old])
    succeeds(post(server, "/end_weight_update"))
    serves(server, answers[new])

    weights = tensors_of(old)
    succeeds(post(server, "/begin_weight_update"))
    succeeds(send({name: weights[name] for name in buckets[0]}))
    fails(send({"model.norm.weight": torch.zeros(3)}), _KEPT)
    fails(send({name: weights[name] for name in buckets[1]}), _KEPT)
    fails(post(server, "/end_weight_update"), _KEPT)
    serves(server, answers[new])

    succeeds(post(server, "/begin_weight_update"))
    fails(post(server, "/update_weights_from_tensor", serialized_named_tensors=[]), _KEPT)  # too few for the ranks
    fails(post(server, "/end_weight_update"), _KEPT)
    serves(server, answers[new])


def test_updates_from_a_trainer(server: Server, old: Path, answers: dict[Path, Answers]) -> None:
    """Tensors are broadcast by a process that is rank 0 of a group with all ranks of the server."""
    from sglang.srt.utils import init_custom_process_group

    port, name = free_port(), "trainer"
    group: dict[str, Any] = {"master_address": "127.0.0.1", "master_port": port, "group_name": name}
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(
            post, server, "/init_weights_update_group", **group, rank_offset=1, world_size=1 + RANKS, backend="gloo"
        )
        trainer = init_custom_process_group(
            backend="gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            world_size=1 + RANKS,
            rank=0,
            group_name=name,
            timeout=timedelta(seconds=60),
        )
        succeeds(joined.result())
        weights = tensors_of(old)
        succeeds(post(server, "/begin_weight_update"))
        body = {
            "names": list(weights),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()],
            "shapes": [list(tensor.shape) for tensor in weights.values()],
            "group_name": name,
        }
        answer = pool.submit(post, server, "/update_weights_from_distributed", **body)
        for tensor in weights.values():
            torch.distributed.broadcast(tensor, src=0, group=trainer)
        succeeds(answer.result())
        succeeds(post(server, "/end_weight_update"))
        serves(server, answers[old])
        left = pool.submit(post, server, "/destroy_weights_update_group", group_name=name)
        succeeds(left.result())
        torch.distributed.destroy_process_group(trainer)


def test_a_paused_server(server: Server, old: Path, new: Path, answers: dict[Path, Answers]) -> None:
    """A request that was under way goes on with the new weights, as in SGLang: a pause keeps its cache."""
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.generate, PROMPTS[12], 200, 0)
        assert post(server, "/pause_generation", mode="in_place").status_code == 200
        succeeds(post(server, "/update_weights_from_disk", model_path=str(new), flush_cache=False))
        assert post(server, "/continue_generation").status_code == 200
        assert under_way.result()
    assert post(server, "/flush_cache").status_code == 200
    serves(server, answers[new])


def mapped_bytes(server: Server) -> int:
    """Of the memory that ranks share, in all of them."""
    return sum(Held.by(rank_process(server, rank).pid).shared_bytes for rank in range(server.ranks))


@pytest.mark.parametrize("tags", [None, ["weights"]])
def test_memory_is_released(
    server: Server, old: Path, new: Path, answers: dict[Path, Answers], tags: list[str] | None
) -> None:
    """As where a trainer takes turns with the server on its GPUs."""
    before = mapped_bytes(server)
    assert before >= sum(report["stored_bytes"] for report in server.reports()) > 0
    assert post(server, "/release_memory_occupation", tags=tags).status_code == 200
    assert mapped_bytes(server) == 0
    fails(post(server, "/update_weights_from_disk", model_path=str(old)), _KEPT, "was released")
    assert post(server, "/resume_memory_occupation", tags=tags).status_code == 200
    assert mapped_bytes(server) == before
    for model in (old, new):
        succeeds(post(server, "/update_weights_from_disk", model_path=str(model)))
        serves(server, answers[model])


def test_memory_of_the_cache_is_released(server: Server, new: Path, answers: dict[Path, Answers]) -> None:
    assert post(server, "/release_memory_occupation", tags=["kv_cache"]).status_code == 200
    assert post(server, "/resume_memory_occupation", tags=["kv_cache"]).status_code == 200
    serves(server, answers[new])


def test_what_is_unsupported(server: Server) -> None:
    assert "unsupported with --enable-dwdp" in post(server, "/update_weights_from_ipc", zmq_handles={}).text
    assert json.dumps(server.reports())
