"""What every kind of GPU memory needs of the CUDA driver."""

from __future__ import annotations

from typing import Any

import torch
from cuda.bindings import driver


def call(function: Any, *arguments: Any) -> Any:
    """A driver call's result.

    Raises:
        OSError: the driver refused, with the call's and the error's names.
    """
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise OSError(f"{function.__name__}: {status.name}")
    return values[0] if values else None


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


def tensor_at(address: int, nbytes: int, device: int) -> torch.Tensor:
    """`[nbytes]` uint8 over memory of the GPU `device`, which must stay mapped while the tensor is used."""
    return torch.as_tensor(_Pointer(address, nbytes), device=f"cuda:{device}")


def make_current(device: int) -> None:
    """Make the device's primary context, which torch uses too, this thread's current one."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.zeros(1, device=f"cuda:{device}")


def torch_bytes(device: int) -> int:
    """What torch's allocator holds of the device, its cache included."""
    return int(torch.cuda.memory_reserved(device))
