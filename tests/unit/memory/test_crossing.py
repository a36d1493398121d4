"""Memory whose handles are bytes: of two processes, and what a group over hosts says of memory that cannot be read."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.memory.base import Handle
from sglang_dwdp.memory.crossing import check_crossing
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.host import HostBlock
from sglang_dwdp.memory.host_path import HostPathMemory
from sglang_dwdp.memory.places import TcpPlace
from tests.fixtures.ranks import open_resources

PAGE = HostPathMemory.page_bytes


def on_ranks(memories: list[HostPathMemory], state: Callable[[], str] | None = None) -> list[Any]:
    """The result of `check_crossing` on ranks that meet by TCP, an exception where it raised."""
    name, first = uuid.uuid4().hex, TcpPlace.open("127.0.0.1")

    def one(rank: int) -> Any:
        place = first if rank == 0 else TcpPlace(first.host, first.port)
        exchange = Exchange(name, rank, len(memories), 10.0, place)
        try:
            exchange.connect()
            return check_crossing("host-path", lambda: memories[rank], exchange, state)
        except Exception as error:  # noqa: BLE001  (it is the result)
            return error
        finally:
            exchange.close()

    with ThreadPoolExecutor(len(memories)) as pool:
        found = list(pool.map(one, range(len(memories))))
    first.close()
    return found


def test_memory_that_can_be_read_leaves_nothing_behind() -> None:
    before = open_resources()
    assert on_ranks([HostPathMemory() for _ in range(3)]) == [None] * 3
    assert open_resources() == before


class _NotMade(HostPathMemory):
    def create(self, nbytes: int) -> HostBlock:
        raise OSError("cuMemCreate: CUDA_ERROR_NOT_PERMITTED")


class _NotImported(HostPathMemory):
    def import_handle(self, handle: Handle, nbytes: int) -> HostBlock:
        raise OSError("cuMemImportFromShareableHandle: CUDA_ERROR_INVALID_DEVICE")


class _AnotherFile(HostPathMemory):
    def import_handle(self, handle: Handle, nbytes: int) -> HostBlock:
        return self.create(nbytes)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (_NotMade, "host-path makes no memory that others can map (rank 1: cuMemCreate: CUDA_ERROR_NOT_PERMITTED"),
        (_NotImported, "host-path cannot map its peers' memory (rank 1: cuMemImportFromShareableHandle: "),
        (_AnotherFile, "host-path reads other bytes than its peers wrote (rank 1: it read [0, 2, 0]"),
    ],
)
def test_what_a_rank_cannot_do_is_said_on_all_ranks(kind: type[HostPathMemory], text: str) -> None:
    before = open_resources()
    for result in on_ranks([HostPathMemory(), kind(), HostPathMemory()], lambda: "no fabric"):
        assert isinstance(result, DwdpConfigError)
        assert text in str(result)
        assert "(no fabric))" in str(result)
        assert "set --dwdp-group-size to a divisor of the ranks of one" in str(result)
        assert "\n" not in str(result)
    assert open_resources() == before


def export_and_wait(connection: Connection) -> None:
    memory = HostPathMemory()
    block = memory.create(PAGE)
    pages = memory.reserve(PAGE)
    pages.map(0, block)
    pages.tensor(PAGE).fill_(42)
    connection.send(memory.export(block))
    connection.recv()


def test_a_path_reaches_another_process_and_dies_with_it() -> None:
    here, there = multiprocessing.Pipe()
    exporter = multiprocessing.get_context("fork").Process(target=export_and_wait, args=(there,))
    exporter.start()
    handle = here.recv()
    memory = HostPathMemory()
    with pytest.raises(OSError, match=f"a block of {PAGE} bytes where {2 * PAGE} were agreed on"):
        memory.import_handle(handle, 2 * PAGE)
    block = memory.import_handle(handle, PAGE)
    assert not os.get_inheritable(block.fd)
    pages = memory.reserve(PAGE)
    pages.map(0, block)
    block.close()
    exporter.kill()
    exporter.join()
    assert pages.tensor(PAGE).eq(42).all()
    with pytest.raises(FileNotFoundError):
        memory.import_handle(handle, PAGE)
    pages.close()
