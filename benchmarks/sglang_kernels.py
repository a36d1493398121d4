"""SGLang's MoE kernels outside of a server: what they ask of the process, and DeepGEMM's call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from benchmarks.moe_problems import Case, Experts, Shape


@contextmanager
def published() -> Iterator[None]:
    """Server arguments, and groups of one rank, as SGLang's kernels ask for them."""
    from sglang.srt.runtime_context import get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    from sglang_dwdp.demo.checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory(prefix="sglang-kernels-") as path:
        make_checkpoint(path, num_experts=8)
        publish(ServerArgs(model_path=path, device="cuda", skip_tokenizer_init=True), role="scheduler")
        # Kernels ask for the tensor-parallel group, which a rank of DWDP never sums over.
        group = SimpleNamespace(world_size=1, rank_in_group=0)
        with get_parallel().override(tp_group=group, tp_size=1, moe_tp_size=1):
            yield


def deep_gemm(shape: Shape, *, layout: str = "auto") -> Callable[[Case, Experts], torch.Tensor]:
    """SGLang's DeepGEMM runner for block-FP8 experts in checkpoint order; one at a time in a process.

    layout: "masked" (a place for every token with every expert), "compact", or "auto": masked where it takes little of
    what a server leaves free, 8 GiB here.
    """
    from sglang.srt.environ import envs
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils
    from sglang.srt.layers.moe.moe_runner import deep_gemm as module
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    # Otherwise the first call compiles for every number of tokens, for minutes.
    compile_utils._ENABLE_JIT_DEEPGEMM_PRECOMPILE = False
    envs.SGLANG_DEEPGEMM_STANDARD_LAYOUT.set(layout)  # read in every call
    module.set_masked_standard_layout_memory_budget(8 << 30)
    config = MoeRunnerConfig(
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts,
        hidden_size=shape.hidden,
        intermediate_size_per_partition=shape.inter,
        layer_id=0,
        top_k=shape.top_k,
        num_fused_shared_experts=0,
        params_dtype=torch.bfloat16,
        inplace=False,
    )
    runner = MoeRunner(MoeRunnerBackend.DEEP_GEMM, config)

    def run(case: Case, experts: Experts) -> torch.Tensor:
        info = module.DeepGemmMoeQuantInfo(
            w13_weight=experts["w13"],
            w2_weight=experts["w2"],
            use_fp8=True,
            w13_scale=experts["s13"],
            w2_scale=experts["s2"],
            block_shape=[128, 128],
        )
        # A clone each time: the runner may give its input's memory away.
        given = StandardDispatchOutput(case.x.clone(), None, StandardTopKOutput(case.weights, case.ids, None))
        result: torch.Tensor = runner.run(given, info).hidden_states
        return result

    return run
