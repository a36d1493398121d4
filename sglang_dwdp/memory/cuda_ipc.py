"""GPU memory shared through CUDA IPC: for drivers and containers that do not let driver allocations be exported.

A block is a plain device allocation; a peer opens it at an address of the driver's choice. It cannot be mapped
into a range, so there are no views here: all experts are copied into slots, the rank's own too. When the exporting
process ends, its memory is gone, so a server does not outlive a rank.
"""

from __future__ import annotations

import ctypes

import torch
from cuda.bindings import driver

from sglang_dwdp.config import TRANSPORTS
from sglang_dwdp.memory.base import Block, Handle, Range
from sglang_dwdp.memory.cuda_copy import CudaCopyEngine
from sglang_dwdp.memory.cuda_driver import GpuMemory, call, tensor_at

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
# The driver packs small allocations into one, and a handle then opens all of it; one of whole chunks stands alone.
_CHUNK = 2 << 20


class IpcBlock:
    """A device allocation of this process (`own`) or a peer's.

    One that was handed out is never freed: a peer may still copy from it, and freeing before all of them have closed
    it is undefined. Its memory goes with the process.
    """

    def __init__(self, address: int, nbytes: int, device: int, *, own: bool) -> None:
        self.nbytes = nbytes
        self.is_exported = False
        self._address: int | None = address
        self._device = device
        self._own = own

    @property
    def address(self) -> int:
        if self._address is None:
            raise ValueError("the block is closed")
        return self._address

    def tensor(self) -> torch.Tensor:
        return tensor_at(self.address, self.nbytes, self._device)

    def close(self) -> None:
        if self._address is not None:
            torch.cuda.synchronize(self._device)  # nothing may read what is given back
            address, self._address = self._address, None
            if not self.is_exported:
                call(driver.cuMemFree if self._own else driver.cuIpcCloseMemHandle, address)


class CudaIpcMemory(GpuMemory):
    """One GPU's `Memory`."""

    transport = "cuda-ipc"
    page_bytes = 1  # nothing is mapped, so segments end where experts end
    maps = TRANSPORTS[transport].maps

    def create(self, nbytes: int) -> IpcBlock:
        if nbytes < 1:
            raise ValueError(f"a block of {nbytes} bytes")
        allocated = -(-nbytes // _CHUNK) * _CHUNK
        block = IpcBlock(int(call(driver.cuMemAlloc, allocated)), nbytes, self._device, own=True)
        self._created_bytes += allocated
        return block

    def export(self, block: Block) -> Handle:
        assert isinstance(block, IpcBlock)
        block.is_exported = True
        return ctypes.string_at(int(call(driver.cuIpcGetMemHandle, block.address).getPtr()), HANDLE_BYTES)

    def import_handle(self, handle: Handle, nbytes: int) -> IpcBlock:
        assert isinstance(handle, bytes)
        opened = driver.CUipcMemHandle()
        ctypes.memmove(int(opened.getPtr()), handle, HANDLE_BYTES)
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
        return IpcBlock(int(call(driver.cuIpcOpenMemHandle, opened, flags)), nbytes, self._device, own=False)

    def reserve(self, nbytes: int) -> Range:
        raise TypeError("memory of CUDA IPC cannot be mapped into a range")

    def copy_engine(self, timeout_s: float) -> CudaCopyEngine:
        return CudaCopyEngine(self._device)
