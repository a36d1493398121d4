"""How the ranks of several hosts meet: four processes, two to a host, which go by their ranks alone."""

from __future__ import annotations

import dataclasses
import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.places import TcpPlace
from sglang_dwdp.srt_patches import hosts
from sglang_dwdp.srt_patches.attached import attach_config

SIZE = 4
_ARGUMENTS = dict.fromkeys(hosts._ARGUMENTS, "x")


def parallel(rank: int, group_size: int, group: Any = None, port: int = 1) -> Any:
    return SimpleNamespace(
        tp_rank=rank,
        tp_size=SIZE,
        nnodes=2,
        dwdp_size=group_size,
        dist_init_addr=f"127.0.0.1:{port}",
        tp_group=SimpleNamespace(ranks=list(range(SIZE)), cpu_group=group),
    )


def runner(config: DwdpConfig, model: dict[str, Any]) -> Any:
    arguments = SimpleNamespace(**_ARGUMENTS)
    attach_config(arguments, config)
    hf_config = SimpleNamespace(to_dict=lambda: model)
    return SimpleNamespace(
        is_draft_worker=False,
        server_args=arguments,
        model_config=SimpleNamespace(hf_config=hf_config),
        device="cpu",
    )


def run(
    rank: int, port: int, group_size: int, config: DwdpConfig, model: dict[str, Any], weights: int, results: Any
) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=SIZE)
    own = parallel(rank, group_size, torch.distributed.group.WORLD, port)
    hosts.get_parallel = lambda: own  # type: ignore[assignment]
    try:
        hosts.meet(runner(config, model))
        torch.manual_seed(weights)
        hosts.check_weights(torch.nn.Linear(2, 2))
        place = hosts.place_of_group()
        # What set-up does then: the group meets, and all swap something.
        exchange = Exchange(f"group {rank // group_size}", rank % group_size, group_size, 10.0, place)
        exchange.connect()
        swapped = exchange.all_gather(bytes([rank]))
        exchange.close()
        hosts.watch()
        results.put((rank, place is not None, swapped))
    except Exception as error:  # noqa: BLE001  (it is the result)
        results.put((rank, type(error).__name__, str(error)))


def on_ranks(
    group_size: int, configs: list[DwdpConfig], models: list[dict[str, Any]], weights: tuple[int, ...] = (0,) * SIZE
) -> list[Any]:
    context, place = multiprocessing.get_context("fork"), TcpPlace.open("127.0.0.1")
    port = place.port
    place.close()
    results = context.Queue()
    how = zip(range(SIZE), configs, models, weights, strict=True)
    ranks = [context.Process(target=run, args=(r, port, group_size, *one, results)) for r, *one in how]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    return found


CONFIG = DwdpConfig(timeout_s=20)
MODEL = {"hidden_size": 64, "_name_or_path": "here"}


@pytest.mark.parametrize("group_size", [2, 4])
def test_ranks_of_two_hosts_meet(group_size: int) -> None:
    elsewhere = MODEL | {"_name_or_path": "there"}
    found = on_ranks(group_size, [CONFIG] * SIZE, [MODEL, MODEL, elsewhere, elsewhere])
    for rank, is_across, swapped in found:
        first = rank // group_size * group_size
        assert is_across == (group_size == SIZE)
        assert swapped == [bytes([one]) for one in range(first, first + group_size)]


@pytest.mark.parametrize(
    ("config", "model", "text"),
    [
        (dataclasses.replace(CONFIG, depth=3), MODEL, "here --dwdp-depth 2, there --dwdp-depth 3"),
        (CONFIG, MODEL | {"hidden_size": 7}, "here hidden_size of the model 64, there hidden_size of the model 7"),
        (CONFIG, MODEL | {"new": [1]}, "here nothing, there new of the model [1]"),
    ],
)
def test_hosts_that_were_started_otherwise_are_named(config: DwdpConfig, model: dict[str, Any], text: str) -> None:
    found = on_ranks(2, [CONFIG, CONFIG, config, config], [MODEL, MODEL, model, model])
    assert [kind for _, kind, _ in found] == ["DwdpSetupError"] * SIZE
    for rank, _, error in found[:2]:
        assert f"rank 2 was started with another model or other options: {text}" in error, rank


def test_another_checkpoint_of_the_same_shape_is_named() -> None:
    found = on_ranks(2, [CONFIG] * SIZE, [MODEL] * SIZE, (0, 0, 1, 1))
    for rank, _, error in found[:2]:
        assert "rank 2 loaded another checkpoint: here weights " in error, rank


@pytest.mark.parametrize(
    ("rank", "group_size", "is_across"), [(0, 4, True), (3, 4, True), (0, 2, False), (2, 2, False), (1, 3, True)]
)
def test_groups_over_hosts(rank: int, group_size: int, *, is_across: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "get_parallel", lambda: parallel(rank, group_size))
    assert hosts.is_group_across() == is_across
    assert hosts.host_of(rank) == rank // 2


def test_a_sample_of_weights_tells_checkpoints_apart() -> None:
    one, other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    assert hosts._sample(one) != hosts._sample(other)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.bias.add_(1)  # may be left as a constructor made it
    assert hosts._sample(one) == hosts._sample(other)
