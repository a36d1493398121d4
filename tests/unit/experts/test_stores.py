"""Where bytes are put: what one GPU and the host would let pass, and several GPUs would not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.experts.layout import Span
from sglang_dwdp.experts.views import View
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.host import HostMemory
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import checkpoint, equal, forward, run_ranks

# Experts of no whole number of pages, so that neighbours share some; small tensors that span several pages too.
TAILS = {"w13_weight": (77, 96), "w2_weight": (48, 99), "scale": (700,)}


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[View, Span]]:
    """What was read or written of any view by a copy."""
    seen: list[tuple[View, Span]] = []
    piece = View.piece

    def noted(view: View, span: Span) -> torch.Tensor:
        seen.append((view, span))
        return piece(view, span)

    monkeypatch.setattr(View, "piece", noted)
    return seen


@pytest.mark.parametrize("local_experts", [None, 6, 11])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_no_copy_touches_the_memory_of_two_ranks(
    size: int, local_experts: int | None, pieces: list[tuple[View, Span]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = checkpoint(2, 11, TAILS)
    for name in ("MIN_SLICE_BYTES", "SHORT_SLICE_BYTES"):
        monkeypatch.setattr(f"sglang_dwdp.experts.layout.{name}", 16 << 10)
    config = DwdpConfig(timeout_s=20, local_experts=local_experts)
    seen = run_ranks(
        size, full, lambda r, layers: all(equal(forward(r, layers, tokens), full) for tokens in (1, 1000)), config
    )
    assert seen == [True] * size
    assert pieces
    for view, span in pieces:
        segments = view._spec.layout.segments
        assert any(own.offset <= span.offset and span.end <= own.end for own in segments), (span, segments)


def test_peers_are_told_of_writes_that_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU writes later than the host asks it to, so a rank waits for it before every barrier."""
    told: list[str] = []

    class Late(HostMemory):
        def finish_writes(self) -> None:
            told.append("finished")

    class Watched(Exchange):
        def barrier(self) -> None:
            told.append("barrier")
            super().barrier()

    monkeypatch.setattr("sglang_dwdp.runtime.Exchange", Watched)
    full = checkpoint(1, 6, TAILS)
    assert run_ranks(2, full, lambda _runtime, _layers: True, memory=lambda _rank: Late()) == [True, True]
    # Of each rank: two barriers, each after a wait of its own.
    assert told.count("barrier") == told.count("finished") == 4
    done = 0
    for word in told:
        done += 1 if word == "finished" else -1
        assert done >= 0


def permissions(address: int) -> str:
    """Of the page at an address of this process, as Linux says them ("r--s")."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        pages, how, *_ = line.split()
        start, end = (int(part, 16) for part in pages.split("-"))
        if start <= address < end:
            return how
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.parametrize("local_experts", [None, 6])
def test_only_slots_can_be_written(local_experts: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stray write through a staged view would change what peers read."""
    full = checkpoint(3, 9, TAILS)
    config = DwdpConfig(timeout_s=20, view="staged", local_experts=local_experts)
    monkeypatch.setattr("sglang_dwdp.experts.layer.REPLICATE_BELOW_BYTES", 0)

    def step(runtime: DwdpRuntime, _layers: object) -> bool:
        for shared in runtime._shared.layers:
            shard = shared.layer.placement.shard(runtime.rank)
            remote = [expert for expert in range(9) if expert not in shard]
            own = [shard[len(shard) // 2]]
            for name, tensor in shared.staged.items():
                middle = tensor[0].numel() // 2
                addresses = {expert: tensor[expert].reshape(-1)[middle:].data_ptr() for expert in [*own, *remote]}
                assert permissions(addresses[own[0]]) == "r--s", name
                assert "rw-s" in {permissions(addresses[expert]) for expert in remote}, name
                assert permissions(shared.direct[name][remote[0]].reshape(-1)[middle:].data_ptr()) == "r--s"
        return True

    assert run_ranks(2, full, step, config) == [True, True]
