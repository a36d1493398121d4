"""Copies that do not end are found, described, and end a waiting forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.experts.share import SharedLayer
from sglang_dwdp.experts.slots import Prefetcher
from sglang_dwdp.experts.stalls import CopyWatch
from sglang_dwdp.memory.host import HostCopyEngine


class Source:
    """What is copied from a peer whose link can hang."""

    def __init__(self) -> None:
        self.link = threading.Event()
        self.link.set()

    def copy_to(self, destination: Any) -> None:
        self.link.wait()
        destination.fill_(7)


@pytest.fixture
def source() -> Iterator[Source]:
    result = Source()
    yield result
    result.link.set()  # or the engine's thread would not end


def ring(source: Source, timeout_s: float) -> Prefetcher:
    """Two layers, and a slot for each."""
    engine = HostCopyEngine(timeout_s)
    slot = torch.zeros(4, dtype=torch.uint8)
    plan: Any = [(SimpleNamespace(copy_=lambda peer: peer.copy_to(slot)), source)]
    return Prefetcher(engine, [plan, plan], [4, 4], 2, ["layer 3, 4 bytes from rank 1", "layer 5"].__getitem__)


class Time:
    now = 0.0


def watched(prefetcher: Prefetcher) -> tuple[Callable[[float], bool], list[Any]]:
    """Looks at a time in seconds, with a limit of 10; and what was called back."""
    time, found = Time(), list[Any]()
    watch = CopyWatch(prefetcher, 10.0, found.append, clock=lambda: time.now)

    def look(now: float) -> bool:
        time.now = now
        return watch.look()

    return look, found


def test_a_copy_that_does_not_end_is_called_back_once_the_limit_is_over(source: Source) -> None:
    prefetcher = ring(source, timeout_s=5)
    look, found = watched(prefetcher)
    source.link.clear()
    prefetcher.prime()
    assert [look(0), look(9), look(10)] == [False, False, False]
    assert look(11)
    assert found == [["layer 3, 4 bytes from rank 1", "layer 5"]]


def test_copies_that_end_are_no_stall_however_long_nothing_is_copied(source: Source) -> None:
    prefetcher = ring(source, timeout_s=5)
    look, found = watched(prefetcher)
    prefetcher.prime()
    prefetcher.wait(0)
    prefetcher.wait(1)
    assert not any(look(now) for now in range(0, 100, 7))
    assert found == []


def test_nothing_is_asked_of_the_device_while_copies_are_submitted(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefetcher = ring(source, timeout_s=5)
    look, _ = watched(prefetcher)
    monkeypatch.setattr(prefetcher, "unfinished", lambda: pytest.fail("asked"))
    for now in range(0, 100, 9):
        prefetcher.copied_bytes += 4
        assert not look(now)


def test_the_thread_calls_back_and_ends(source: Source) -> None:
    prefetcher = ring(source, timeout_s=5)
    called = threading.Event()
    watch = CopyWatch(prefetcher, 0.05, lambda _: called.set())
    source.link.clear()
    prefetcher.prime()
    watch.start()
    assert called.wait(5)
    watch.close()
    watch.close()


def test_a_forward_that_waits_ends_with_layer_peer_and_bytes(source: Source) -> None:
    prefetcher = ring(source, timeout_s=0.05)
    source.link.clear()
    prefetcher.prime()
    message = r"^layer 3, 4 bytes from rank 1: a copy of remote experts did not end within 0.05 s"
    with pytest.raises(DwdpRuntimeError, match=message):
        prefetcher.wait(0)


def test_a_fill_in_words() -> None:
    layer: Any = SimpleNamespace(layer_id=7)
    shared = SharedLayer(layer, {}, {}, {}, (), [], copied_from={2: 30, 0: 10})
    assert shared.describe_copies() == "layer 7, 10 bytes from rank 0 and 30 bytes from rank 2"
