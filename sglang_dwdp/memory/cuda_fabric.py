"""GPU memory of several hosts in one address range: driver allocations with fabric handles, which are bytes.

All GPUs have to be in one NVLink domain. A driver may say that it has such handles and support none, so nothing but
making, exporting and importing one tells (`crossing.check_crossing`).
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from glob import glob

import torch
from cuda.bindings import driver

from sglang_dwdp.memory.base import Block, Handle
from sglang_dwdp.memory.cuda import CudaBlock, CudaMemory
from sglang_dwdp.memory.cuda_driver import call

_FABRIC = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC
_SUPPORTED = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED
# NVML_GPU_FABRIC_STATE_…, and the one that follows them
_STATES, _COMPLETED = ("not supported", "not started", "in progress"), 3


class CudaFabricMemory(CudaMemory):
    """One GPU's `Memory`, in the memory of an NVLink domain."""

    transport = "cuda-fabric"
    _handle_type = _FABRIC

    def export(self, block: Block) -> Handle:
        assert isinstance(block, CudaBlock)
        return bytes(call(driver.cuMemExportToShareableHandle, block.handle, _FABRIC, 0).data)

    def import_handle(self, handle: Handle, nbytes: int) -> CudaBlock:
        assert isinstance(handle, bytes)
        fabric = driver.CUmemFabricHandle()
        fabric.data = handle
        return CudaBlock(call(driver.cuMemImportFromShareableHandle, int(fabric.getPtr()), _FABRIC), nbytes)


def fabric_state(device: int) -> str:
    """What the driver, NVML and the system say of fabric handles on a GPU, in words."""
    with_handles = bool(call(driver.cuDeviceGetAttribute, _SUPPORTED, call(driver.cuDeviceGet, device)))
    channels = len(glob("/dev/nvidia-caps-imex-channels/channel*"))
    return (
        f"the driver {'has' if with_handles else 'has no'} fabric handles for this GPU; fabric state by NVML: "
        f"{_nvml_state(device)}; IMEX channels: {channels}"
    )


def _nvml_state(device: int) -> str:
    with suppress(Exception):  # no NVML, or one that knows no fabrics
        import pynvml

        pynvml.nvmlInit()
        info = pynvml.c_nvmlGpuFabricInfo_v2_t()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetGpuFabricInfoV(gpu, ctypes.byref(info))
        if info.state < _COMPLETED:
            return _STATES[info.state]
        return f"completed (status {info.status}, clique {info.cliqueId} of cluster {bytes(info.clusterUuid).hex()})"
    return "unknown"
