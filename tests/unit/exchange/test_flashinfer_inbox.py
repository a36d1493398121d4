"""What of FlashInfer's inbox needs no GPU; tests/gpu/test_exchange.py has the rest."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.exchange.flashinfer_inbox import Communicator, FlashInferInbox, _counters, why_unsupported
from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.memory.handshake import Exchange

SHAPE = RowShape(max_bucket=8, hidden_size=64, top_k=8, dtype=torch.bfloat16)


def test_the_communicator_is_flashinfers() -> None:
    from flashinfer.comm.abstractions import CommBackend

    name = uuid.uuid4().hex

    def one(rank: int) -> Any:
        handshake = Exchange(name, rank, 3, 10)
        handshake.connect()
        communicator = Communicator(handshake)
        assert isinstance(communicator, CommBackend)
        assert (communicator.Get_rank(), communicator.Get_size()) == (rank, 3)
        gathered = communicator.Split(0, rank).allgather({"rank": rank})
        communicator.barrier()
        result = gathered, communicator.bcast(rank, root=1)
        handshake.close()
        return result

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(3))) == [(tuple({"rank": rank} for rank in range(3)), 1)] * 3


@pytest.mark.parametrize(
    ("experts", "size", "shape", "why"),
    [
        (128, 2, SHAPE, None),
        (128, 3, SHAPE, "128 experts on 3 ranks"),
        (2, 2, SHAPE, "2 experts on 2 ranks"),
        (128, 2, RowShape(8, 64, 5, torch.bfloat16), "5 experts a token"),
        (128, 2, RowShape(8, 64, 8, torch.float32), "float32"),
    ],
)
def test_what_is_unsupported_is_said_before_anything_is_allocated(
    experts: int, size: int, shape: RowShape, why: str | None
) -> None:
    found = why_unsupported(experts, size, shape)
    assert (found is None) if why is None else (found is not None and why in found)
    if why is not None:
        with pytest.raises(DwdpSetupError, match=why):
            FlashInferInbox(Exchange("x", 0, size, 1), experts, shape, [0], lambda: [])


def test_flashinfers_numbers_are_found_where_it_says() -> None:
    names = ["FLAG_VAL", "DISPATCH_COMPLETION_FLAGS", "COMBINE_COMPLETION_FLAGS"]
    words = torch.arange(2 * 96, dtype=torch.int32).view(2, 96)
    fake = SimpleNamespace(
        _METAINFO_INDEX={f"{name}_OFFSET_INDEX": at for at, name in enumerate(names)},
        metainfo=torch.tensor([0, 128, 256]),
        workspace=words.view(torch.uint8),
    )
    step, flags = _counters(fake, rank=1, size=2)
    assert step.tolist() == [96]
    assert [flag.tolist() for flag in flags] == [[96 + 32, 96 + 33], [96 + 64, 96 + 65]]
    del fake._METAINFO_INDEX["FLAG_VAL_OFFSET_INDEX"]
    with pytest.raises(DwdpSetupError, match="FLAG_VAL"):
        _counters(fake, rank=1, size=2)
