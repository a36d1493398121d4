"""What every kind of GPU memory needs of the CUDA driver."""

from __future__ import annotations

from typing import Any

import torch
from cuda.bindings import driver


def call(function: Any, *arguments: Any) -> Any:
    """The result of a driver call.

    Raises:
        OSError: the call failed, with the call's and the error's names.
    """
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise OSError(f"{function.__name__}: {status.name}")
    return values[0] if values else None


def tensor_at(address: int, nbytes: int, device: int) -> torch.Tensor:
    """`[nbytes]` uint8 over memory that kernels of the GPU `device` can reach, wherever it lies.

    The memory must stay mapped while the tensor is used. The device is the one that is named, not the one that the
    driver names for the address: a view may begin with a peer's pages. (By `__cuda_array_interface__` torch asks the
    driver, and `torch.as_tensor(…, device=…)` would then return a copy, so that writes are lost.) Private to torch,
    which rebuilds the tensors of CUDA graphs with it; SGLang uses it alike.
    """
    where = torch.device("cuda", device)
    storage = torch._C._construct_storage_from_data_pointer(address, where, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=where).set_(storage)


def make_current(device: int) -> None:
    """Make `device` torch's device in this thread, and its primary context, which torch uses too, the driver's.

    Calls that name no device (cuMemAlloc, cuIpcOpenMemHandle, whether a stream is capturing) then mean this one.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.set_device(device)
    torch.zeros(1, device=f"cuda:{device}")


def torch_bytes(device: int) -> int:
    """What torch's allocator holds of the device, its cache included."""
    return int(torch.cuda.memory_reserved(device))
