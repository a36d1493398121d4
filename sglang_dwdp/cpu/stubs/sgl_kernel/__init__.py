"""A stub of the package sgl_kernel, which cannot be imported without the CUDA driver.

sglang_dwdp.cpu.engine puts this directory on the path on such machines only. It registers no operator, so
SGLang's CPU engine finds none of its optional kernels and computes with plain PyTorch.
"""

from collections.abc import Callable
from typing import NoReturn

__version__ = "0"


def _message(name: str) -> str:
    return (
        f"sgl_kernel.{name} was asked for, but this is sglang_dwdp's empty stub of sgl_kernel "
        f"({__file__}), used on machines without libcuda.so.1. The CPU engine has no such kernel; "
        "choose a backend that is written in PyTorch, such as --attention-backend torch_native."
    )


def _missing_kernel(name: str) -> Callable[..., NoReturn]:
    def kernel(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(_message(name))

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("_"):  # what inspect, pickle and others look for in any module
        raise AttributeError(_message(name))
    # On a CPU SGLang imports the kernels named *_cpu without asking whether they are there, and
    # calls them for speculative decoding and with AMX only. So these fail when they are called.
    if name.endswith("_cpu"):
        return _missing_kernel(name)
    raise ImportError(_message(name))  # an AttributeError would become a bare "cannot import name"
