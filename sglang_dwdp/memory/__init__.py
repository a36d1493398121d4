"""Memory that the ranks of a group share: one protocol (base.py), one module for each kind of memory."""

from __future__ import annotations

from sglang_dwdp.config import transports_of
from sglang_dwdp.memory.base import Memory


def memory_for(device: str, index: int, transport: str, *, across_hosts: bool = False) -> Memory:
    """The memory of a rank.

    Args:
        device: "cpu" or "cuda".
        index: The GPU's.
        transport: A name of `config.TRANSPORTS`, or "auto" for the default of the device and the group.
        across_hosts: Whether the ranks of the group are on several hosts.
    """
    if transport == "auto":
        transport = transports_of(device, across_hosts=across_hosts)[0]
    if transport == "host-shm":
        from sglang_dwdp.memory.host import HostMemory

        return HostMemory()
    if transport == "host-path":
        from sglang_dwdp.memory.host_path import HostPathMemory

        return HostPathMemory()
    if transport == "cuda-ipc":
        from sglang_dwdp.memory.cuda_ipc import CudaIpcMemory

        return CudaIpcMemory(index)
    if transport == "cuda-fabric":
        from sglang_dwdp.memory.cuda_fabric import CudaFabricMemory

        return CudaFabricMemory(index)
    from sglang_dwdp.memory.cuda import CudaMemory  # needs the CUDA driver

    return CudaMemory(index)
