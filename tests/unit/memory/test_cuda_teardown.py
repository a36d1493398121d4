"""GPU memory is given back as far as the driver lets it, whichever of its calls fails. The driver is a fake."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cuda.bindings")

from sglang_dwdp.experts.views import SlotMemory
from sglang_dwdp.memory import cuda

PAGE = 4096


class Driver:
    """Counts what is reserved, mapped and allocated; the `fails`-th call that gives something back fails."""

    def __init__(self) -> None:
        self.reserved, self.mapped, self.handles = set[int](), set[int](), set[int]()
        self.fails, self.returned = 0, 0

    def call(self, function: Any, *arguments: Any) -> Any:
        name, first = function.__name__, arguments[0]
        held = {
            "cuMemAddressReserve": self.reserved,
            "cuMemAddressFree": self.reserved,
            "cuMemMap": self.mapped,
            "cuMemUnmap": self.mapped,
            "cuMemCreate": self.handles,
            "cuMemRelease": self.handles,
        }.get(name)
        if name in ("cuMemUnmap", "cuMemAddressFree", "cuMemRelease"):
            self.returned += 1
            if self.returned == self.fails:
                raise OSError(f"{name}: CUDA_ERROR_INVALID_VALUE")
            assert held is not None
            held.remove(first)
        elif name == "cuMemMap":
            self.mapped.add(first)
        elif held is not None:
            held.add(new := PAGE * (1 + len(self.reserved) + 100 * len(self.handles)))
            return new
        return os.open(os.devnull, os.O_RDONLY) if name == "cuMemExportToShareableHandle" else None

    def left(self) -> int:
        return len(self.reserved) + len(self.mapped) + len(self.handles)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    result = Driver()
    monkeypatch.setattr(cuda, "call", result.call)
    monkeypatch.setattr(cuda.torch.cuda, "synchronize", lambda _device: None)
    return result


@contextmanager
def unchanged_descriptors() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def block(driver: Driver) -> cuda.CudaBlock:
    return cuda.CudaBlock(driver.call(SimpleNamespace(__name__="cuMemCreate"), PAGE), PAGE)


def take_down(driver: Driver) -> None:
    """A range of three exported blocks, and a slot of two."""
    slots = SlotMemory(SimpleNamespace(), 0)  # type: ignore[arg-type]
    with ExitStack() as owned:
        owned.callback(slots.close)
        slots._blocks = {(0, "w", index, PAGE): block(driver) for index in range(2)}
        pages = cuda.CudaRange(3 * PAGE, 0)
        owned.callback(pages.close)
        for index in range(3):
            owned.callback((mapped := block(driver)).close)
            mapped.export()
            pages.map(index * PAGE, mapped)


def test_everything_is_given_back(driver: Driver) -> None:
    with unchanged_descriptors():
        take_down(driver)
    assert driver.left() == 0
    assert driver.returned == 3 + 1 + 3 + 2


@pytest.mark.parametrize("fails", range(1, 10))
def test_after_one_failure_the_rest_is_given_back(driver: Driver, fails: int) -> None:
    driver.fails = fails
    with unchanged_descriptors(), pytest.raises(OSError, match="CUDA_ERROR_INVALID_VALUE"):
        take_down(driver)
    assert driver.left() == 1
    assert driver.returned == 9
