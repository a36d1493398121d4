"""What of FlashInfer's inbox needs no GPU; tests/gpu/test_exchange.py has the rest."""

from __future__ import annotations

import contextlib
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.errors import DwdpRuntimeError, DwdpSetupError
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


class Kernels:
    """The kernels of a joint forward on rank 0, as its host sees them: they wait for flags, one step after another.

    Each look at `query` lets them go on by one step, if its flags are right.
    """

    def __init__(self, size: int, layers: int, living: list[int]) -> None:
        self.step = torch.ones(1, dtype=torch.int32)
        self.flags = torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
        self.last = 2 * layers
        self.living = living

    def query(self) -> bool:
        step = int(self.step)
        flags = self.flags[1 - step % 2]
        flags[[0, *self.living]] = step
        if step <= self.last and (flags == step).all():
            self.step += 1
        return int(self.step) > self.last


def inbox_of(kernels: Kernels, lost: list[int]) -> FlashInferInbox:
    inbox = object.__new__(FlashInferInbox)
    inbox.rank, inbox.size = 0, len(kernels.flags[0])
    inbox._layer_ids, inbox._lost, inbox._void = [3, 5, 8], lambda: lost, False
    inbox._step, inbox._flags = kernels.step, kernels.flags
    inbox._beside = SimpleNamespace(synchronize=lambda: None)
    inbox._host_step = torch.zeros(1, dtype=torch.int32)
    inbox._host_flags = torch.zeros(inbox.size, dtype=torch.int32)
    return inbox


@pytest.fixture
def _no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


@pytest.mark.usefixtures("_no_streams")
@pytest.mark.parametrize(("lost", "why"), [([], "nothing came within 0.05 s"), ([2], r"ranks \[2\] ended")])
def test_a_wait_that_cannot_end_is_ended_by_the_host(lost: list[int], why: str) -> None:
    kernels = Kernels(3, 3, living=[1])
    inbox = inbox_of(kernels, lost)
    with pytest.raises(DwdpRuntimeError, match=rf"MoE layer 3 of a joint forward waited for ranks \[2\]: {why}"):
        inbox.wait(kernels, 0.05)
    assert kernels.query()  # it has run through
    start = time.monotonic()
    with pytest.raises(DwdpRuntimeError, match="MoE layer"):
        inbox.wait(following_kernels(kernels), 60)  # launched before it failed: no second limit
    assert time.monotonic() - start < 10


def following_kernels(kernels: Kernels) -> Kernels:
    """The next forward's, of the same memory."""
    following = Kernels(3, 0, kernels.living)
    following.step, following.flags, following.last = kernels.step, kernels.flags, kernels.last * 2
    return following


@pytest.mark.usefixtures("_no_streams")
def test_the_layer_is_the_one_that_waits() -> None:
    kernels = Kernels(2, 6, living=[1])
    for _ in range(2 * 4 + 1):
        kernels.query()
    kernels.living = []  # it dies in the combine of the fifth layer, which is the second of the second forward
    with pytest.raises(DwdpRuntimeError, match=r"MoE layer 5 .* ranks \[1\]"):
        inbox_of(kernels, [1]).wait(kernels, 60)


@pytest.mark.usefixtures("_no_streams")
def test_what_came_before_the_peer_ended_is_no_error() -> None:
    kernels = Kernels(2, 3, living=[])
    kernels.step.fill_(6)
    kernels.flags[1].fill_(6)  # the last combine has all it needs, and only has to end
    looks = iter([False, False, True])
    inbox_of(kernels, [1]).wait(SimpleNamespace(query=lambda: next(looks)), 60)
