"""SGLang's Triton MoE on views gives bitwise what it gives on resident experts; one GPU is enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import PlainLayer, checkpoint, run_ranks

pytestmark = pytest.mark.gpu(3)

NUM_EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 128, 2048, 768, 8  # Qwen3-30B-A3B


@pytest.fixture(scope="module")
def fused_experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """SGLang's kernel, in a process whose server arguments are published as in a server's."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts_impl
    from sglang.srt.runtime_context import get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    from tests.fixtures.families import make_checkpoint

    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3_moe", num_experts=8)
    arguments = ServerArgs(model_path=str(path), device="cuda", skip_tokenizer_init=True)
    publish(arguments, role="scheduler")
    # The kernel asks for the tensor-parallel group, which a rank of DWDP never sums over.
    with get_parallel().override(tp_group=SimpleNamespace(world_size=1, rank_in_group=0), tp_size=1, moe_tp_size=1):
        yield fused_experts_impl


@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "skewed"])
@pytest.mark.parametrize("view", ["direct", "staged"])
@pytest.mark.parametrize("size", [2, 3])
def test_moe_on_views_gpu(fused_experts: Any, size: int, view: Any, skewed: bool) -> None:
    full = checkpoint(
        3, NUM_EXPERTS, {"w13_weight": (2 * INTERMEDIATE, HIDDEN), "w2_weight": (HIDDEN, INTERMEDIATE)}, "cuda"
    )
    generator = torch.Generator("cuda").manual_seed(1)
    cases = []
    for tokens in (1, 7, 64, 1000, 4096):
        x = torch.randn(tokens, HIDDEN, generator=generator, device="cuda").to(torch.bfloat16) / 8
        logits = torch.randn(tokens, NUM_EXPERTS, generator=generator, device="cuda")
        if skewed:  # almost all tokens go to the last expert, which is remote on all ranks but one
            logits[:, -1] += 100
        weights, ids = logits.softmax(-1).topk(TOP_K)
        cases.append((x, weights, ids.int()))

    def moe(case: Any, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        x, weights, ids = case
        result: torch.Tensor = fused_experts(x.clone(), w13, w2, weights, ids)
        return result

    expected = [[moe(case, layer["w13_weight"], layer["w2_weight"]) for layer in full] for case in cases]
    assert all(result.isfinite().all() and result.any() for row in expected for result in row)

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> bool:
        same = True
        for case, row in zip(cases, expected, strict=True):
            for _ in range(2):
                runtime.begin_forward(len(case[0]))
                runtime.prime()
                for layer, result in zip(layers, row, strict=True):
                    runtime.wait(layer.layer_id)
                    got = moe(case, layer.tensors["w13_weight"], layer.tensors["w2_weight"])
                    runtime.release(layer.layer_id)
                    same &= torch.equal(got, result)
                runtime.end_forward(len(case[0]))
        return same

    assert run_ranks(size, full, step, DwdpConfig(view=view)) == [True] * size
