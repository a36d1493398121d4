"""GPU memory of several processes in one address range: the CUDA driver's virtual memory management.

A block is a driver allocation, exported as a POSIX file descriptor; a peer's block is mapped like one's own, and
kernels and copy engines read it over the link. The driver maps all of a handle, from offset 0.

Where ranks have a GPU each, a range lies on several GPUs. Only this rank's GPU is given access to it, so only streams
of that GPU may work on it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import torch
from cuda.bindings import driver

from sglang_dwdp.memory.base import Block, Handle, Range
from sglang_dwdp.memory.cuda_copy import CudaCopyEngine
from sglang_dwdp.memory.cuda_driver import GpuMemory, call, tensor_at

_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ACCESS = driver.CUmemAccess_flags
_DEVICE = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE


class CudaBlock:
    """A driver allocation of this process or of a peer."""

    def __init__(self, handle: Any, nbytes: int) -> None:
        self.handle = handle
        self.nbytes = nbytes
        self._fds: list[int] = []

    def tensor(self) -> torch.Tensor:
        raise TypeError("a driver allocation has no address before it is mapped into a range")

    def export(self) -> int:
        fd = int(call(driver.cuMemExportToShareableHandle, self.handle, _FD, 0))
        self._fds.append(fd)
        return fd

    def close(self) -> None:
        if self.handle is not None:
            handle, self.handle = self.handle, None
            with ExitStack() as closing:  # goes on after one that fails
                # The memory itself stays for as long as it is mapped anywhere.
                closing.callback(call, driver.cuMemRelease, handle)
                for fd in self._fds:
                    closing.callback(os.close, fd)


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
        self._allow_all(offset, nbytes, _ACCESS.CU_MEM_ACCESS_FLAGS_PROT_READ)

    def allow_writes(self, offset: int, nbytes: int) -> None:
        self._allow_all(offset, nbytes, _ACCESS.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)

    def _allow_all(self, offset: int, nbytes: int, what: Any) -> None:
        first = self._at(offset, nbytes)
        for address, size in self._mapped:  # block by block: each may lie on another GPU
            if first <= address < first + nbytes:
                self._allow(address, size, what)

    def _allow(self, address: int, nbytes: int, what: Any) -> None:
        access = driver.CUmemAccessDesc()
        access.location.type = _DEVICE
        access.location.id = self._device
        access.flags = what
        call(driver.cuMemSetAccess, address, nbytes, [access], 1)

    def tensor(self, nbytes: int) -> torch.Tensor:
        return tensor_at(self._at(0, nbytes), nbytes, self._device)

    def close(self) -> None:
        if self._address is None:
            return
        address, self._address = self._address, None
        with ExitStack() as closing:
            closing.callback(call, driver.cuMemAddressFree, address, self.nbytes)
            self.vacate()

    def vacate(self) -> None:
        torch.cuda.synchronize(self._device)  # nothing may read what is unmapped
        mapped, self._mapped = self._mapped, []
        with ExitStack() as unmapping:  # goes on after one that fails
            for address, nbytes in mapped:
                unmapping.callback(call, driver.cuMemUnmap, address, nbytes)


class CudaMemory(GpuMemory):
    """One GPU's `Memory`."""

    transport = "cuda-vmm"
    _handle_type = _FD
    maps = True

    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = _DEVICE
        self._properties.location.id = device
        self._properties.requestedHandleTypes = self._handle_type
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.page_bytes = int(call(driver.cuMemGetAllocationGranularity, self._properties, least))

    def create(self, nbytes: int) -> CudaBlock:
        if nbytes < 1 or nbytes % self.page_bytes:
            raise ValueError(f"a block has whole pages of {self.page_bytes} bytes, not {nbytes} bytes")
        block = CudaBlock(call(driver.cuMemCreate, nbytes, self._properties, 0), nbytes)
        self._created_bytes += nbytes
        return block

    def export(self, block: Block) -> Handle:
        assert isinstance(block, CudaBlock)
        return block.export()

    def import_handle(self, handle: Handle, nbytes: int) -> CudaBlock:
        assert isinstance(handle, int)
        try:
            return CudaBlock(call(driver.cuMemImportFromShareableHandle, handle, _FD), nbytes)
        finally:
            os.close(handle)

    def reserve(self, nbytes: int) -> Range:
        return CudaRange(nbytes, self._device)

    def copy_engine(self, timeout_s: float) -> CudaCopyEngine:
        return CudaCopyEngine(self._device)
