"""Memory that the ranks of a group share: one protocol (base.py), one module for each kind of memory."""

from __future__ import annotations

from sglang_dwdp.memory.base import Memory


def memory_for(device: str, index: int, transport: str) -> Memory:
    """The memory of a rank on `device` ("cpu" or "cuda"); `index` is the GPU's, `transport` the option's value."""
    if transport == "cuda-ipc":
        from sglang_dwdp.memory.cuda_ipc import CudaIpcMemory

        return CudaIpcMemory(index)
    if device == "cuda":
        from sglang_dwdp.memory.cuda import CudaMemory  # needs the CUDA driver

        return CudaMemory(index)
    from sglang_dwdp.memory.host import HostMemory

    return HostMemory()
