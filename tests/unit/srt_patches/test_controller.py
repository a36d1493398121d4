"""What the controller makes of requests before it hands them to ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import data_parallel_controller
from sglang.srt.managers.data_parallel_controller import DataParallelController

from sglang_dwdp.srt_patches.controller import weigh_embeddings


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        (SimpleNamespace(input_ids=[5, 6, 7], input_embeds=None), 3),
        (SimpleNamespace(input_ids=None, input_embeds=[[0.1, 0.2]] * 9), 9),
        (SimpleNamespace(input_ids=[5]), 1),  # a kind of request that has no embeddings
    ],
)
def test_requests_are_weighed_by_their_tokens(request_: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[int] = []

    def dispatch(_method: Any, estimated_tokens: int) -> int:
        weighed.append(estimated_tokens)
        return 1

    sent: list[Any] = []
    monkeypatch.setattr(data_parallel_controller, "sock_send", lambda worker, req: sent.append((worker, req)))
    controller = SimpleNamespace(
        maybe_external_dp_rank_routing=lambda _req: False,
        dp_budget=SimpleNamespace(dispatch=dispatch),
        workers=["rank 0", "rank 1"],
    )
    weigh_embeddings(DataParallelController.total_tokens_scheduler, controller, request_)
    assert weighed == [tokens]
    assert sent == [("rank 1", request_)]
