"""One MoE layer, kernels side by side: FlashInfer, Triton and DeepGEMM, on resident experts and on views.

    python benchmarks/moe_layer.py --out results.json [--shapes qwen r1 gpt-oss] [--tokens 1 8 64 1024 8192]

Needs one Hopper GPU. A view has half of its experts in a block of memory that was exported and imported again, as a
peer's would be; both halves lie on this GPU, so the figures say what mapping costs a kernel, and nothing of NVLink.
Each figure is the median of several rounds, in which resident and view take turns. A kernel that cannot run is
listed with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.moe_problems import (
    DEEPSEEK_R1,
    GPT_OSS_120B,
    QWEN3_30B,
    Case,
    Experts,
    Shape,
    as_bf16,
    for_flashinfer,
    make,
    make_case,
    run_flashinfer,
    run_triton,
)
from sglang_dwdp.kernels_build import load
from sglang_dwdp.layout import tensor_layout
from sglang_dwdp.memory.cuda_vmm import CudaMemory
from sglang_dwdp.placement import balanced
from sglang_dwdp.views import TensorSpec, view_of

LAYERS = {
    "qwen": ((QWEN3_30B, "bf16"), (QWEN3_30B, "fp8-block")),
    "r1": ((DEEPSEEK_R1, "fp8-block"),),
    "gpt-oss": ((GPT_OSS_120B, "mxfp4"),),
}
Kernel = Callable[[Case, Experts], torch.Tensor]


class Views:
    """Views on experts, half of them in imported memory."""

    def __init__(self) -> None:
        self._memory = CudaMemory(torch.cuda.current_device())
        self._open: list[Any] = []

    def of(self, experts: Experts) -> dict[str, torch.Tensor]:
        """The same experts in views."""
        return {name: self._view(name, tensor) for name, tensor in experts.items()}

    def _view(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        count = len(tensor)
        layout = tensor_layout(balanced(count, 2), tensor[0].numel() * tensor.element_size(), self._memory.page_bytes)
        placed, made = [], []
        for rank, span in enumerate(layout.segments):
            if not span.nbytes:
                continue
            block = self._memory.create(span.nbytes)
            made.append(block)
            if rank == 1:
                block = self._memory.import_handle(self._memory.export(block), span.nbytes)
                made.append(block)
            placed.append((span.offset, block))
        view = view_of(self._memory, TensorSpec(name, tensor.dtype, tuple(tensor.shape[1:]), layout), placed)
        for block in made:  # the view holds the memory
            block.close()
        view.bytes.copy_(tensor.reshape(-1).view(torch.uint8))
        self._open.append(view)
        return view.tensor

    def close(self) -> None:
        for view in self._open:
            view.close()
        self._open = []


def deep_gemm(shape: Shape) -> Kernel:
    """SGLang's DeepGEMM runner for block-FP8 experts in checkpoint order."""
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmMoeQuantInfo
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

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
        info = DeepGemmMoeQuantInfo(
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


def publish_sglang() -> None:
    """What SGLang's kernels ask for: server arguments, and groups of one process."""
    import tempfile

    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    from sglang_dwdp.demo.checkpoint import make_checkpoint
    from sglang_dwdp.demo.server import free_port

    path = tempfile.mkdtemp(prefix="moe-layer-")
    make_checkpoint(path, "qwen3_moe", num_experts=8)
    publish(ServerArgs(model_path=path, device="cuda", skip_tokenizer_init=True), role="scheduler")
    init_distributed_environment(
        backend="nccl",
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{free_port()}",
    )
    initialize_model_parallel()


def median_ms(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median time of each of `runs`, which take turns, on the GPU."""
    for run in runs:
        for _ in range(3):
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for index, run in enumerate(runs):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[index].append(begin.elapsed_time(end))
    return [statistics.median(one) for one in times]


def kernels_of(shape: Shape, weight_format: str, experts: Experts) -> dict[str, Callable[[], tuple[Kernel, Experts]]]:
    """By name, what makes a kernel and the experts that it reads."""

    def flashinfer() -> tuple[Kernel, Experts]:
        prepared = for_flashinfer(weight_format, experts)
        return lambda case, given: run_flashinfer(weight_format, case, given, fused_finalize=True), prepared

    def triton() -> tuple[Kernel, Experts]:
        given = as_bf16(weight_format, experts) if weight_format == "mxfp4" else experts
        return lambda case, held: run_triton(weight_format, case, held), given

    name = "Triton (bf16 copies)" if weight_format == "mxfp4" else "Triton"
    made: dict[str, Callable[[], tuple[Kernel, Experts]]] = {"FlashInfer": flashinfer, name: triton}
    if weight_format == "fp8-block":
        made["DeepGEMM"] = lambda: (deep_gemm(shape), experts)
    return made


def measure(shape: Shape, weight_format: str, tokens: list[int], rounds: int, console: Console) -> list[dict[str, Any]]:
    """All rows of one layer."""
    experts = make(weight_format, shape)
    rows = []
    for name, prepare in kernels_of(shape, weight_format, experts).items():
        row: dict[str, Any] = {"model": shape.name, "format": weight_format, "kernel": name}
        views = Views()
        try:
            kernel, resident = prepare()
            on_view = views.of(resident)
            for count in tokens:
                case = make_case(shape, count)
                runs = [partial(kernel, case, resident), partial(kernel, case, on_view)]
                here, there = median_ms(runs, rounds)
                rows.append({**row, "tokens": count, "resident_ms": here, "view_ms": there})
                console.print(f"{shape.name} {weight_format} {name} {count}: {here:.3f} ms, on a view {there:.3f} ms")
        except Exception as error:  # noqa: BLE001  (a kernel that is missing must not end the comparison)
            rows.append({**row, "error": f"{type(error).__name__}: {error}"[:500]})
            console.print(f"{shape.name} {weight_format} {name}: {rows[-1]['error']}", style="red")
        finally:
            views.close()
            resident = on_view = {}
            torch.cuda.empty_cache()
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    result = Table("model", "format", "kernel", "tokens", "resident ms", "view ms", "view over resident")
    for row in rows:
        if "error" in row:
            result.add_row(row["model"], row["format"], row["kernel"], "", row["error"][:60], "", "")
        else:
            over = f"{100 * (row['view_ms'] / row['resident_ms'] - 1):+.1f} %"
            times = (f"{row['resident_ms']:.3f}", f"{row['view_ms']:.3f}", over)
            result.add_row(row["model"], row["format"], row["kernel"], str(row["tokens"]), *times)
    return result


def main() -> None:
    """Measure, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 1024, 8192])
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    console = Console(width=160)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("needs a Hopper GPU")
    load.install()
    publish_sglang()
    rows: list[dict[str, Any]] = []
    content = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    for name in args.shapes:
        for shape, weight_format in LAYERS[name]:
            rows += measure(shape, weight_format, args.tokens, args.rounds, console)
            args.out.write_text(json.dumps(content, indent=1) + "\n")  # after each, in case time runs out
    console.print(table(rows))
    sys.stdout.flush()
    os._exit(0)  # NCCL's threads would keep the process


if __name__ == "__main__":
    main()
