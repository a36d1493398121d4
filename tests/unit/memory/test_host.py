"""Blocks, ranges and the copy thread, in one process and in two."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.memory.host import HostCopyEngine, HostMemory

PAGE = HostMemory.page_bytes


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_one_contiguous_tensor_over_two_blocks() -> None:
    memory = HostMemory()
    low, high = memory.create(PAGE), memory.create(2 * PAGE)
    whole = memory.reserve(3 * PAGE)
    whole.map(0, low)
    whole.map(PAGE, high)
    alone = memory.reserve(2 * PAGE)
    alone.map(0, high)
    low.close()
    high.close()  # mappings keep the memory
    values = torch.arange(3 * PAGE, dtype=torch.int64).to(torch.uint8)
    whole.tensor(3 * PAGE).copy_(values)
    assert torch.equal(alone.tensor(2 * PAGE), values[PAGE:])
    whole.close()
    alone.close()


def test_descriptors_and_mappings_are_given_back() -> None:
    memory = HostMemory()

    def once() -> None:
        block = memory.create(PAGE)
        pages = memory.reserve(4 * PAGE)
        pages.map(PAGE, block)
        for _ in range(2):  # closing twice is as good as once
            pages.close()
            block.close()

    once()
    fds, maps = len(os.listdir("/proc/self/fd")), mappings()
    for _ in range(64):
        once()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert mappings() <= maps + 1  # the allocator may split one of its own


def test_wrong_sizes() -> None:
    memory = HostMemory()
    with pytest.raises(ValueError, match="whole pages"):
        memory.create(PAGE + 1)
    block = memory.create(PAGE)
    pages = memory.reserve(PAGE)
    for offset in (-PAGE, 1, PAGE):
        with pytest.raises(ValueError, match="are not pages of a range"):
            pages.map(offset, block)
    with pytest.raises(OSError, match=f"a block of {PAGE} bytes where {2 * PAGE} were agreed on"):
        memory.import_handle(os.dup(block.fd), 2 * PAGE)
    pages.close()
    with pytest.raises(ValueError, match="closed"):
        pages.tensor(PAGE)
    block.close()


def test_what_does_not_fit_fails_at_creation() -> None:
    with pytest.raises(OSError, match="bytes of host memory wanted"):
        HostMemory().create(1 << 62)


def export_and_wait(connection: socket.socket, hold: int) -> None:
    memory = HostMemory()
    block = memory.create(PAGE)
    pages = memory.reserve(PAGE)
    pages.map(0, block)
    pages.tensor(PAGE).fill_(42)
    socket.send_fds(connection, [b"x"], [memory.export(block)])
    time.sleep(hold)


def write_to_protected() -> None:
    faulthandler.disable()  # the crash is wanted
    memory = HostMemory()
    block = memory.create(PAGE)
    pages = memory.reserve(PAGE)
    pages.map(0, block)
    pages.protect(0, PAGE)
    assert pages.tensor(PAGE).sum() == 0
    pages.tensor(PAGE).fill_(1)


def test_a_peers_memory_outlives_its_killed_process() -> None:
    context = multiprocessing.get_context("fork")
    here, there = socket.socketpair(socket.AF_UNIX)
    exporter = context.Process(target=export_and_wait, args=(there, 60))
    exporter.start()
    _, fds, _, _ = socket.recv_fds(here, 1, 1)
    memory = HostMemory()
    block = memory.import_handle(fds[0], PAGE)
    pages = memory.reserve(PAGE)
    pages.map(0, block)
    block.close()
    assert exporter.pid is not None
    os.kill(exporter.pid, signal.SIGKILL)
    exporter.join()
    assert pages.tensor(PAGE).eq(42).all()
    pages.close()
    here.close()
    there.close()


def test_protected_memory_cannot_be_written() -> None:
    process = multiprocessing.get_context("fork").Process(target=write_to_protected)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGSEGV


class Gate:
    """A destination whose copy ends when it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def copy_(self, _source: torch.Tensor) -> None:
        assert self.opened.wait(10)


def closed(gate: Gate) -> Any:
    """A list of copies that does not end before the gate is opened."""
    return [(gate, torch.zeros(0))]


def test_copies_run_in_order() -> None:
    engine, gate = HostCopyEngine(5.0), Gate()
    source, destination = torch.arange(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    released, filled = engine.event(), engine.event()
    engine.record(released)
    copies = [(destination[:5], source[5:]), (destination[5:], destination[:5])]
    engine.fill(closed(gate) + copies, released, filled)
    time.sleep(0.05)
    assert destination.sum() == 0
    gate.opened.set()
    engine.wait(filled)
    assert torch.equal(destination, source[5:].repeat(2))
    engine.close()
    engine.close()


def test_a_wait_is_for_the_last_of_several_fills() -> None:
    engine, gate = HostCopyEngine(5.0), Gate()
    first, second, slot = torch.full((4,), 1), torch.full((4,), 2), torch.zeros(4, dtype=torch.int64)
    released, filled = engine.event(), engine.event()
    engine.fill([(slot, first)], released, filled)
    engine.fill([*closed(gate), (slot, second)], released, filled)
    time.sleep(0.05)  # the first fill is over, the second waits
    assert slot.eq(1).all()
    threading.Timer(0.05, gate.opened.set).start()
    engine.wait(filled)
    assert slot.eq(2).all()
    engine.close()


def test_what_a_wait_takes_is_exposed() -> None:
    engine, gate = HostCopyEngine(5.0), Gate()
    released, filled = engine.event(), engine.event()
    engine.wait(filled)  # nothing was asked for
    engine.fill([], released, filled)
    time.sleep(0.05)
    engine.wait(filled)
    assert engine.exposed_s() < 0.02
    assert len(engine.take_waits()) == 2
    engine.fill(closed(gate), released, filled)
    threading.Timer(0.1, gate.opened.set).start()
    engine.wait(filled)
    assert 0.09 < engine.exposed_s() < 1
    [wait] = engine.take_waits()  # each wait is taken once
    assert wait > 0.09
    engine.close()


def test_a_wait_ends_in_time_and_says_so() -> None:
    engine, gate = HostCopyEngine(0.1), Gate()
    filled = engine.event()
    engine.fill(closed(gate), engine.event(), filled)
    with pytest.raises(DwdpRuntimeError, match=r"did not end within 0.1 s .--dwdp-timeout-s"):
        engine.wait(filled)
    gate.opened.set()
    engine.close()


def test_a_failed_copy_is_reported_to_the_waiting_forward() -> None:
    engine = HostCopyEngine(5.0)
    filled = engine.event()
    engine.fill([(torch.zeros(3), torch.zeros(4))], engine.event(), filled)
    with pytest.raises(DwdpRuntimeError, match="copying remote experts failed"):
        engine.wait(filled)
    engine.close()
    assert not any(thread.name.startswith("dwdp-copy") for thread in threading.enumerate())
