"""Parameters that were not written, in part or at all, are found, and values are never taken for marks."""

from __future__ import annotations

import pytest
import torch

from sglang_dwdp.support import unwritten
from sglang_dwdp.support.unwritten import has_marks, mark, mark_uninitialized

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    with mark_uninitialized():
        return torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_written_is_found(dtype: torch.dtype) -> None:
    tensor = empty(6, 64, dtype=dtype)
    assert has_marks(tensor)
    tensor.data[:5] = 1
    assert has_marks(tensor)  # a row is left, as of a checkpoint with fewer experts or heads
    tensor.data[5] = 1
    assert not has_marks(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_and_odd_tensors(dtype: torch.dtype) -> None:
    for shape in ((), (1,), (3,), (33,)):
        tensor = empty(*shape, dtype=dtype)
        assert has_marks(tensor), shape
        tensor.data.fill_(1)
        assert not has_marks(tensor), shape
    assert not has_marks(empty(0, dtype=dtype))


def test_one_element_of_a_float_is_enough() -> None:
    tensor = empty(100, dtype=torch.float32)
    tensor.data[:99] = 0
    assert has_marks(tensor)


def test_random_bytes_and_nan_are_values() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=generator)
    assert not has_marks(data)
    assert not has_marks(data.view(torch.int32))
    assert not has_marks(torch.full((64,), float("nan")))
    assert not has_marks(torch.full((64,), float("nan"), dtype=torch.bfloat16))
    assert not has_marks(torch.full((64,), float("nan")).to(torch.float8_e4m3fn))


def test_values_of_constructors_are_kept() -> None:
    with mark_uninitialized():
        made = [torch.ones(64), torch.zeros(64), torch.full((64,), 2.0), torch.nn.Linear(64, 64).weight]
        made += [torch.empty(64).fill_(1.0), torch.empty_like(made[0]).copy_(made[0]), torch.randn(64)]
    assert not any(map(has_marks, made))
    assert made[0].sum() == 64
    mark(made[0])
    assert has_marks(made[0])


def test_other_ways_to_get_memory_are_marked_too() -> None:
    with mark_uninitialized():
        like = torch.ones(64)
        made = [torch.empty_like(like), like.new_empty(64), torch.empty_strided((8, 8), (8, 1))]
    assert all(map(has_marks, made))


def test_large_tensors_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unwritten, "_CHUNK_BYTES", 256)
    for dtype in (torch.float32, torch.uint8):
        tensor = empty(4096, dtype=dtype)
        tensor.data[:4000] = 1
        assert has_marks(tensor)
        tensor.data[4000:] = 1
        assert not has_marks(tensor)


def test_memory_that_is_not_there_or_not_in_order_is_left_alone() -> None:
    mark(torch.empty(4, device="meta"))
    assert not has_marks(torch.empty(4, device="meta"))
    across = torch.ones(4, 4).t()
    mark(across)
    assert across.sum() == 16
