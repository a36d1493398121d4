"""FlashInfer's MoE on views gives bitwise what it gives on resident experts, and both are near a float64 reference.

One Hopper GPU is enough. FlashInfer's kernels must be there: `python kernels/build.py --format F`, or its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.block_fp8 import Workspace
from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.moe_problems import (
    FORMATS,
    Case,
    Shape,
    as_bf16,
    for_flashinfer,
    make,
    make_case,
    reference,
    relative_error,
    run_flashinfer,
    run_triton,
)
from tests.fixtures.ranks import PlainLayer, run_ranks
from tests.gpu.views import differences

pytestmark = pytest.mark.gpu(3)

SHAPES = {
    "bf16": Shape("Qwen3-30B-A3B", 128, 2048, 768, 8),
    "fp8-block": Shape("Qwen3-30B-A3B", 128, 2048, 768, 8),
    "mxfp4": Shape("gpt-oss, smaller", 32, 1536, 1408, 4),
}
BOUNDS = {"bf16": 1e-2, "fp8-block": 5e-2, "mxfp4": 5e-2}
TOKENS = (1, 2, 7, 33, 64, 65, 1000, 4096)


@pytest.fixture(scope="module", params=FORMATS)
def weight_format(request: pytest.FixtureRequest) -> str:
    from sglang_dwdp.support import flashinfer_modules

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    flashinfer_modules.install()
    name: str = request.param
    if not flashinfer_modules.ready(name):
        pytest.skip(f"needs `python kernels/build.py --format {name}`")
    return name


@pytest.fixture(scope="module")
def sglang_published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Server arguments and groups of one rank, as SGLang's kernels ask for them."""
    from sglang.srt.runtime_context import get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    from tests.fixtures.families import make_checkpoint

    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3_moe", num_experts=8)
    publish(ServerArgs(model_path=str(path), device="cuda", skip_tokenizer_init=True), role="scheduler")
    with get_parallel().override(tp_group=SimpleNamespace(world_size=1, rank_in_group=0), tp_size=1, moe_tp_size=1):
        yield


Results = list[list[torch.Tensor]]  # of each case, of each layer


@pytest.fixture(scope="module")
def full(weight_format: str) -> list[dict[str, torch.Tensor]]:
    """Three layers, resident."""
    return [for_flashinfer(weight_format, make(weight_format, SHAPES[weight_format], seed)) for seed in range(3)]


@pytest.fixture(scope="module", params=[False, True], ids=["uniform", "skewed"])
def expected(
    request: pytest.FixtureRequest, weight_format: str, full: list[dict[str, torch.Tensor]]
) -> tuple[list[Case], Results]:
    """Inputs, and what resident experts make of them, the same every time. FlashInfer takes its first tactics."""
    cases = [make_case(SHAPES[weight_format], tokens, skewed=request.param) for tokens in TOKENS]
    first, second = ([[run_flashinfer(weight_format, case, layer) for layer in full] for case in cases] for _ in "ab")
    assert all(result.isfinite().all() and result.any() for row in first for result in row)
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    return cases, first


@pytest.mark.parametrize("view", ["direct", "staged"])
@pytest.mark.parametrize("size", [2, 3])
def test_bitwise_on_views_gpu(
    weight_format: str, full: list[dict[str, torch.Tensor]], expected: tuple[list[Case], Results], size: int, view: Any
) -> None:
    cases, results = expected

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> list[int]:
        return differences(
            runtime, layers, cases, results, lambda case, experts: run_flashinfer(weight_format, case, experts)
        )

    assert run_ranks(size, full, step, DwdpConfig(view=view)) == [[]] * size


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_error_against_float64_gpu(weight_format: str, sglang_published: None, tokens: int) -> None:
    shape = SHAPES[weight_format]
    experts = make(weight_format, shape)
    case: Case = make_case(shape, tokens)
    exact = reference(weight_format, case, experts)
    flashinfer = relative_error(run_flashinfer(weight_format, case, for_flashinfer(weight_format, experts)), exact)
    plain = as_bf16(weight_format, experts) if weight_format == "mxfp4" else experts
    triton = relative_error(run_triton(weight_format, case, plain), exact)
    print(f"{weight_format}, {tokens} tokens: FlashInfer {flashinfer:.2e}, Triton {triton:.2e}")  # noqa: T201
    bound = BOUNDS[weight_format]
    assert flashinfer < (bound if weight_format == "bf16" else max(bound, triton))


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_in_a_cuda_graph_gpu(weight_format: str, full: list[dict[str, torch.Tensor]], tokens: int) -> None:
    first, second = (make_case(SHAPES[weight_format], tokens, seed=seed) for seed in (1, 2))
    expected = [[run_flashinfer(weight_format, case, layer) for layer in full] for case in (first, second)]

    done = threading.Event()

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        if runtime.rank:  # captures of several threads would disturb each other, and so would this one's end
            return done.wait(60)
        try:
            return replays(layers)
        finally:
            done.set()

    def replays(layers: list[PlainLayer]) -> bool:
        held = Case(first.x.clone(), first.ids.clone(), first.weights.clone())
        for layer in layers:
            run_flashinfer(weight_format, held, layer.tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = [run_flashinfer(weight_format, held, layer.tensors) for layer in layers]
        same = True
        for case, row in zip((first, second, first), (*expected, expected[0]), strict=True):
            for target, source in zip((held.x, held.ids, held.weights), (case.x, case.ids, case.weights), strict=True):
                target.copy_(source)
            graph.replay()
            torch.cuda.synchronize()
            same &= all(torch.equal(a, b) for a, b in zip(outputs, row, strict=True))
        return same

    assert run_ranks(2, full, step, DwdpConfig(view="direct")) == [True, True]


def test_the_workspace_changes_nothing_gpu(weight_format: str, full: list[dict[str, torch.Tensor]]) -> None:
    if weight_format != "fp8-block":
        pytest.skip("only the block-FP8 path brings its own")
    from sglang_dwdp.block_fp8 import Sizes

    shape = SHAPES[weight_format]
    experts = full[0]
    workspace = Workspace(torch.device("cuda"))
    sizes = Sizes(shape.num_experts, shape.hidden, shape.inter, shape.top_k)
    for tokens in (1, 1000, 4096, 64):
        case = make_case(shape, tokens)
        buffer = workspace.take(sizes, tokens, fused_finalize=False)
        expected = run_flashinfer(weight_format, case, experts)
        assert torch.equal(run_flashinfer(weight_format, case, experts, workspace=buffer), expected)
