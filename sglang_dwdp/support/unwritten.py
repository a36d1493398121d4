"""Finding parameters, or parts of them, that nothing has written. Pure torch.

While a model is constructed, memory that is handed out without a value gets a mark, a repeated pattern of bytes that
weights do not have: every constructor or loader that gives a value overwrites it. What still has marks when the
weights are loaded was never written, whatever the loader did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Little-endian 0x7FD5 is a NaN in float16 and bfloat16, and so is its repetition in float32 and float64. It is not the
# NaN that arithmetic gives, so that one in a checkpoint is not taken for it.
_LOW, _HIGH = 0xD5, 0x7F
_MARK = {2: 0x7FD5, 4: 0x7FD57FD5, 8: 0x7FD57FD57FD57FD5}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_RUN_BYTES = 16  # of integers and 8-bit floats, any single value may be a weight; a run of this length is none
_CHUNK_BYTES = 64 << 20  # examined at a time, to bound the memory that it takes

_EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


def mark(tensor: torch.Tensor) -> None:
    """Overwrite a tensor with marks. One that is not contiguous, or has no memory, is left alone."""
    if tensor.is_meta or not tensor.is_contiguous() or tensor.dtype is torch.bool:
        return
    data = _bytes(tensor)
    data[0::2].fill_(_LOW)
    data[1::2].fill_(_HIGH)


def mark_uninitialized() -> AbstractContextManager[Any]:
    """A context in which memory without a value, as `torch.empty` gives it, has marks."""
    mode: AbstractContextManager[Any] = _MarkingMode()  # type: ignore[no-untyped-call]
    return mode


class _MarkingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY and isinstance(result, torch.Tensor):
            mark(result)
        return result


def has_marks(tensor: torch.Tensor) -> bool:
    """Whether some of a tensor was not written since it got its marks.

    For integers and 8-bit floats a part counts from 31 bytes on (less where the tensor is smaller than 16 bytes), for
    other floats from one element on.
    """
    if tensor.is_meta or not tensor.numel() or tensor.dtype is torch.bool:
        return False
    data = _bytes(tensor)
    size = tensor.element_size()
    if tensor.is_floating_point() and size in _MARK:
        return _any(data.view(_INTEGERS[size]), _CHUNK_BYTES // size, lambda part: part == _signed(_MARK[size], size))
    runs = data.numel() // _RUN_BYTES
    if not runs:
        expected = torch.tensor([_LOW, _HIGH], dtype=torch.uint8, device=data.device).repeat(_RUN_BYTES // 2)
        return bool(torch.equal(data, expected[: data.numel()]))
    pairs = data[: runs * _RUN_BYTES].clone() if data.storage_offset() % 8 else data[: runs * _RUN_BYTES]
    return _any(
        pairs.view(torch.int64).view(runs, 2), _CHUNK_BYTES // _RUN_BYTES, lambda part: (part == _MARK[8]).all(dim=1)
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _signed(value: int, size: int) -> int:
    return value - (1 << 8 * size) if value >> (8 * size - 1) else value


def _any(data: torch.Tensor, step: int, is_marked: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    return any(bool(is_marked(part).any()) for part in torch.split(data, step))
