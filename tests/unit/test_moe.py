"""What of the block-FP8 path needs no GPU; tests/gpu has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_dwdp.block_fp8 import dummy_routing, run_time_compiler, swap_halves, warm_up_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_halves_are_swapped_in_place_expert_by_expert(dtype: torch.dtype) -> None:
    tensor = torch.arange(2 * 4 * 3).view(2, 4, 3).to(dtype)
    gate, up = tensor[:, :2].clone(), tensor[:, 2:].clone()
    address = tensor.data_ptr()
    swap_halves(tensor)
    assert torch.equal(tensor.float(), torch.cat((up, gate), dim=1).float())
    assert tensor.data_ptr() == address
    swap_halves(tensor)
    assert torch.equal(tensor.float(), torch.cat((gate, up), dim=1).float())


def test_rows_without_halves() -> None:
    with pytest.raises(ValueError, match="no two halves"):
        swap_halves(torch.zeros(2, 3, 4))


def tile(tokens: int) -> tuple[int, ...]:
    """What FlashInfer's choice of a tile depends on (deep_gemm/jit_utils.cuh, fp8_blockscale_gemm_kernel.cuh)."""
    if tokens < 64:  # 32 on most GPUs, 64 on H20: below it by the number itself
        return (tokens,)
    block = 64 if tokens <= 64 else 128
    return block, -(-tokens // block), tokens >= 1024


@given(st.integers(1, 9000))
def test_warm_up_visits_every_tile(max_tokens: int) -> None:
    visited = warm_up_tokens(max_tokens)
    assert visited == sorted(set(visited))
    assert (visited[0], visited[-1]) == (1, max_tokens)
    assert {tile(tokens) for tokens in visited} == {tile(tokens) for tokens in range(1, max_tokens + 1)}
    assert len(visited) < 70 + max_tokens // 60


def test_dummy_routing() -> None:
    ids, weights = dummy_routing(50, 7, 3, "cpu")
    assert (ids.dtype, ids.shape) == (torch.int32, (50, 3))
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert torch.bincount(ids.flatten().long()).tolist() == pytest.approx([150 / 7] * 7, abs=1)
    assert weights.sum(dim=1).tolist() == pytest.approx([1.0] * 50)


def test_the_compiler_is_where_flashinfer_looks_for_it(tmp_path: Path) -> None:
    for folder in ("path", "home/bin", "named"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch(mode=0o755)
    path = {"PATH": f"{tmp_path}/path"}
    assert run_time_compiler(path) == f"{tmp_path}/path/nvcc"
    assert run_time_compiler({**path, "CUDA_HOME": f"{tmp_path}/home"}) == f"{tmp_path}/home/bin/nvcc"
    named = {**path, "TRTLLM_DG_NVCC_COMPILER": f"{tmp_path}/named/nvcc", "CUDA_HOME": f"{tmp_path}/home"}
    assert run_time_compiler(named) == f"{tmp_path}/named/nvcc"
    assert run_time_compiler({**path, "CUDA_HOME": f"{tmp_path}/nowhere"}) is None
    assert run_time_compiler({"PATH": f"{tmp_path}/home"}) is None
