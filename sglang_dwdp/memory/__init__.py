"""Memory that the ranks of a group share: one protocol (base.py), one module for each kind of memory."""

from __future__ import annotations

from sglang_dwdp.memory.base import Memory


def memory_for(device: str, index: int) -> Memory:
    """The memory of a rank on `device` ("cpu" or "cuda"); `index` is the GPU's."""
    if device == "cuda":
        from sglang_dwdp.memory.cuda_vmm import CudaMemory  # needs the CUDA driver

        return CudaMemory(index)
    from sglang_dwdp.memory.host_shm import HostMemory

    return HostMemory()
