"""What the controller makes of requests before it hands them to ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import data_parallel_controller
from sglang.srt.managers.data_parallel_controller import DataParallelController, DPBudget

from sglang_dwdp.srt_patches import controller as hooks
from sglang_dwdp.srt_patches.controller import choose_rank

FIRST, SECOND = list(range(640)), list(range(1000, 1640))


class Controller(SimpleNamespace):
    """A `DataParallelController` of two ranks, as far as it is used."""

    maybe_external_dp_rank_routing = DataParallelController.maybe_external_dp_rank_routing

    def __init__(self) -> None:
        super().__init__(workers=["rank 0", "rank 1"], _active_workers=[0, 1], dp_budget=DPBudget(2), server_args=None)

    def send(self, ids: list[int] | None, rank: int | None = None, **more: Any) -> int:
        """Hand out a request; returns the rank that got it."""
        request = SimpleNamespace(input_ids=ids, routed_dp_rank=rank, **more)
        choose_rank(DataParallelController.total_tokens_scheduler, self, request)
        worker, sent = self.sent.pop()
        assert sent is request
        return int(worker.removeprefix("rank "))


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    monkeypatch.setattr(hooks, "resolving_view", lambda _args: SimpleNamespace(disable_radix_cache=False))
    result = Controller()
    result.sent = []
    monkeypatch.setattr(data_parallel_controller, "sock_send", lambda worker, req: result.sent.append((worker, req)))
    return result


def idle(controller: Controller) -> None:
    controller.dp_budget.total_tokens = [0, 0]
    controller.dp_budget.total_requests = [0, 0]


def test_requests_are_weighed_by_their_tokens(controller: Controller) -> None:
    assert controller.send([5] * 700) == 0
    assert controller.send([6] * 300) == 1
    assert controller.send([7] * 300) == 1
    assert controller.dp_budget.total_tokens == [700, 600]
    assert controller.dp_budget.total_requests == [1, 2]


def test_embeddings_are_weighed_too(controller: Controller) -> None:
    assert controller.send(None, input_embeds=[[0.1, 0.2]] * 9) == 0
    assert controller.dp_budget.total_tokens == [9, 0]
    assert controller.send([5]) == 1


def test_a_prompt_goes_where_its_beginning_was(controller: Controller) -> None:
    assert [controller.send(FIRST), controller.send(SECOND)] == [0, 1]
    for turns in range(3):
        idle(controller)
        assert controller.send([*SECOND, *([turns] * 100)]) == 1
        assert controller.send([*FIRST, *([turns] * 100)]) == 0


def test_a_rank_that_is_busier_than_it_saves_is_left_alone(controller: Controller) -> None:
    assert controller.send(FIRST) == 0
    controller.dp_budget.total_tokens = [600, 0]
    assert controller.send(FIRST) == 0
    controller.dp_budget.total_tokens = [700, 0]
    assert controller.send(FIRST) == 1
    controller.dp_budget.total_tokens = [1, 0]  # now both have seen it
    assert controller.send(FIRST) == 1


def test_what_was_sent_to_a_rank_by_name_is_known(controller: Controller) -> None:
    assert controller.send(FIRST, rank=1) == 1
    assert controller.send([*FIRST, 1]) == 1


def test_without_a_cache_nothing_is_preferred(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "resolving_view", lambda _args: SimpleNamespace(disable_radix_cache=True))
    assert [controller.send(FIRST), controller.send(FIRST)] == [0, 1]
