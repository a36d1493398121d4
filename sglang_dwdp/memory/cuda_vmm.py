"""GPU memory of several processes in one address range: the CUDA driver's virtual memory management.

A block is a driver allocation, exported as a POSIX file descriptor; a peer's block is mapped like one's own, and
kernels and copy engines read it over the link. The driver wants a handle mapped whole and at offset 0.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import torch
from cuda.bindings import driver

from sglang_dwdp.memory.base import Block, CopyList, Event, Range

_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ACCESS = driver.CUmemAccess_flags
_DEVICE = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE


def call(function: Any, *arguments: Any) -> Any:
    """A driver call's result.

    Raises:
        OSError: the driver refused, with the call's and the error's names.
    """
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise OSError(f"{function.__name__}: {status.name}")
    return values[0] if values else None


class CudaBlock:
    """A driver allocation of this process or of a peer."""

    def __init__(self, handle: Any, nbytes: int) -> None:
        self.handle = handle
        self.nbytes = nbytes
        self._fds: list[int] = []

    def export(self) -> int:
        fd = int(call(driver.cuMemExportToShareableHandle, self.handle, _FD, 0))
        self._fds.append(fd)
        return fd

    def close(self) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            for fd in self._fds:
                os.close(fd)
            # The memory itself stays for as long as it is mapped anywhere.
            call(driver.cuMemRelease, handle)


class _Pointer:
    """What torch needs to see memory as a tensor without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class CudaRange:
    """Reserved device address space; blocks are mapped into it."""

    def __init__(self, nbytes: int, device: int) -> None:
        self.nbytes = nbytes
        self._device = device
        self._mapped: list[tuple[int, int]] = []
        self._address: int | None = int(call(driver.cuMemAddressReserve, nbytes, 0, 0, 0))

    def _at(self, offset: int, nbytes: int) -> int:
        if self._address is None:
            raise ValueError("the range is closed")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset}..{offset + nbytes} are not in a range of {self.nbytes} bytes")
        return self._address + offset

    def map(self, offset: int, block: Block) -> None:
        assert isinstance(block, CudaBlock)
        address = self._at(offset, block.nbytes)
        call(driver.cuMemMap, address, block.nbytes, 0, block.handle, 0)
        self._mapped.append((address, block.nbytes))
        self._allow(address, block.nbytes, _ACCESS.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)

    def protect(self, offset: int, nbytes: int) -> None:
        self._allow(self._at(offset, nbytes), nbytes, _ACCESS.CU_MEM_ACCESS_FLAGS_PROT_READ)

    def _allow(self, address: int, nbytes: int, what: Any) -> None:
        access = driver.CUmemAccessDesc()
        access.location.type = _DEVICE
        access.location.id = self._device
        access.flags = what
        call(driver.cuMemSetAccess, address, nbytes, [access], 1)

    def tensor(self, nbytes: int) -> torch.Tensor:
        return torch.as_tensor(_Pointer(self._at(0, nbytes), nbytes), device=f"cuda:{self._device}")

    def close(self) -> None:
        if self._address is None:
            return
        torch.cuda.synchronize(self._device)  # nothing may read what is unmapped
        address, self._address = self._address, None
        for mapped, nbytes in reversed(self._mapped):
            call(driver.cuMemUnmap, mapped, nbytes)
        call(driver.cuMemAddressFree, address, self.nbytes)


class CudaCopyEngine:
    """A stream of the copy engines beside the current stream."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._submit = _batch_function()
        self._stopwatch = _Stopwatch()

    def event(self) -> Event:
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def record(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        event.record(torch.cuda.current_stream(self._device))

    def prepare(self, copies: CopyList) -> Any:
        destinations = [destination.data_ptr() for destination, _ in copies]
        sources = [source.data_ptr() for _, source in copies]
        sizes = [source.numel() for _, source in copies]
        if self._submit is None or not copies:
            return list(zip(destinations, sources, sizes, strict=True))
        return _Batch(self._submit, destinations, sources, sizes)

    def fill(self, prepared: Any, after: Event, done: Event) -> None:
        assert isinstance(after, torch.cuda.Event)
        assert isinstance(done, torch.cuda.Event)
        stream = self._stream
        assert stream is not None
        stream.wait_event(after)
        if isinstance(prepared, _Batch):
            prepared.submit(stream.cuda_stream)
        else:
            for destination, source, nbytes in prepared:
                call(driver.cuMemcpyAsync, destination, source, nbytes, stream.cuda_stream)
        done.record(stream)

    def wait(self, done: Event) -> None:
        assert isinstance(done, torch.cuda.Event)
        stream = torch.cuda.current_stream(self._device)
        finish = self._stopwatch.start(stream)
        stream.wait_event(done)
        if finish is not None:
            finish.record(stream)

    def exposed_s(self) -> float:
        return self._stopwatch.seconds()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
            self._stream = None


class _Stopwatch:
    """How long the compute stream stood at its waits, by pairs of events around each of them.

    The pairs are used in turn and read when their turn comes again, or when someone asks, so nothing ever waits
    for the GPU. A wait that finds its pair still on the way, many waits later, is not timed.
    """

    PAIRS = 512

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self._running: list[bool] = []
        self._turn = 0
        self._ms = 0.0

    def start(self, stream: Any) -> Any:
        """Note that `stream` is about to wait; the event to record after the wait, or None where it is not timed."""
        index = self._turn
        self._turn = (index + 1) % self.PAIRS
        if index == len(self._pairs):
            timed = torch.cuda.Event
            self._pairs.append((timed(enable_timing=True), timed(enable_timing=True)))  # type: ignore[no-untyped-call]
            self._running.append(False)
        if not self._read(index):
            return None
        first, last = self._pairs[index]
        first.record(stream)
        self._running[index] = True
        return last

    def seconds(self) -> float:
        """All waits that the GPU has passed."""
        for index in range(len(self._pairs)):
            self._read(index)
        return self._ms / 1000

    def _read(self, index: int) -> bool:
        """Add what a pair measured; False while the GPU is still on its way there."""
        if self._running[index]:
            first, last = self._pairs[index]
            if not last.query():
                return False
            self._ms += first.elapsed_time(last)
            self._running[index] = False
        return True


class _Batch:
    """The arguments of one `cuMemcpyBatchAsync`, built once: a layer's whole copy plan is one driver call."""

    def __init__(self, submit: Any, destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        count = len(sizes)
        self._submit = submit
        self._count = ctypes.c_size_t(count)
        self._destinations = (ctypes.c_uint64 * count)(*destinations)
        self._sources = (ctypes.c_uint64 * count)(*sources)
        self._sizes = (ctypes.c_size_t * count)(*sizes)
        self._attributes = driver.CUmemcpyAttributes()
        # The source may be read in any order with what the stream does before, which is nothing but the wait.
        self._attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._first = (ctypes.c_size_t * 1)(0)

    def submit(self, stream: int) -> None:
        status = self._submit(
            self._destinations,
            self._sources,
            self._sizes,
            self._count,
            ctypes.c_void_p(int(self._attributes.getPtr())),
            self._first,
            ctypes.c_size_t(1),
            ctypes.c_void_p(stream),
        )
        if status:
            raise OSError(f"cuMemcpyBatchAsync: {driver.CUresult(status).name}")


def _batch_function() -> Any:
    """The driver's function in the form that CUDA 13 gave it; None where a driver lacks it.

    Through ctypes: cuda.bindings would build the three arrays anew at every call.
    """
    function = getattr(ctypes.CDLL("libcuda.so.1"), "cuMemcpyBatchAsync_v2", None)
    if function is not None:
        function.restype = ctypes.c_int
    return function


class CudaMemory:
    """One GPU's `Memory`."""

    transport = "cuda-vmm"

    def __init__(self, device: int) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.zeros(1, device=f"cuda:{device}")  # makes the device's primary context the current one
        self._device = device
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = _DEVICE
        self._properties.location.id = device
        self._properties.requestedHandleTypes = _FD
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.page_bytes = int(call(driver.cuMemGetAllocationGranularity, self._properties, least))

    def create(self, nbytes: int) -> CudaBlock:
        if nbytes < 1 or nbytes % self.page_bytes:
            raise ValueError(f"a block has whole pages of {self.page_bytes} bytes, not {nbytes} bytes")
        return CudaBlock(call(driver.cuMemCreate, nbytes, self._properties, 0), nbytes)

    def export(self, block: Block) -> int:
        assert isinstance(block, CudaBlock)
        return block.export()

    def import_fd(self, fd: int, nbytes: int) -> CudaBlock:
        try:
            return CudaBlock(call(driver.cuMemImportFromShareableHandle, fd, _FD), nbytes)
        finally:
            os.close(fd)

    def reserve(self, nbytes: int) -> Range:
        return CudaRange(nbytes, self._device)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def copy_engine(self, timeout_s: float) -> CudaCopyEngine:
        return CudaCopyEngine(self._device)
