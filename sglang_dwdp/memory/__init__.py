"""Memory that the ranks of a group share: one protocol (base.py), one module for each kind of memory."""

from __future__ import annotations

from sglang_dwdp.config import transports_of
from sglang_dwdp.memory.base import Memory


def memory_for(device: str, index: int, transport: str) -> Memory:
    """The memory of a rank.

    Args:
        device: "cpu" or "cuda".
        index: the GPU's.
        transport: a name of `config.TRANSPORTS`, or "auto" for the device's default.
    """
    if transport == "auto":
        transport = transports_of(device)[0]
    if transport == "host-shm":
        from sglang_dwdp.memory.host import HostMemory

        return HostMemory()
    if transport == "cuda-ipc":
        from sglang_dwdp.memory.cuda_ipc import CudaIpcMemory

        return CudaIpcMemory(index)
    from sglang_dwdp.memory.cuda import CudaMemory  # needs the CUDA driver

    return CudaMemory(index)
