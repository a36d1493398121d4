"""One MoE layer, kernels side by side, on resident experts and on views: python benchmarks/moe_layer.py --out FILE

Needs one Hopper GPU. A view has half of its experts in a block of memory that was exported and imported again, as a
peer's would be; both halves lie on this GPU, so the figures say what mapping costs a kernel, and nothing of NVLink.
FlashInfer's tactics are tuned first, as SGLang does it at start. A kernel that cannot run is listed with its error, and
what --time-limit leaves no time for is listed as not measured. The file is written after every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

# DeepGEMM would compile kernels for every number of tokens at its first call; here each is compiled when it is used.
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import machine
from sglang_dwdp.experts.layer import ExpertTensor
from sglang_dwdp.experts.layout import tensor_layout
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.experts.views import TensorSpec, View
from sglang_dwdp.memory.cuda import CudaMemory
from sglang_dwdp.support import flashinfer_modules
from tests.fixtures import moe_problems as moe
from tests.fixtures.moe_problems import Case, Experts, Shape
from tests.fixtures.sglang_kernels import deep_gemm, published

LAYERS = {
    "qwen-bf16": (moe.QWEN3_30B, "bf16"),
    "qwen-fp8": (moe.QWEN3_30B, "fp8-block"),
    "r1": (moe.DEEPSEEK_R1, "fp8-block"),
    "gpt-oss": (moe.GPT_OSS_120B, "mxfp4"),
}
ROUNDS = 3  # in which resident experts and views take turns
Kernel = Callable[[Case, Experts], torch.Tensor]


class Views:
    """Views of experts, half of them in imported memory."""

    def __init__(self) -> None:
        self._memory = CudaMemory(torch.cuda.current_device())
        self._open: list[Any] = []

    def of(self, experts: Experts) -> dict[str, torch.Tensor]:
        """The same experts in views."""
        return {name: self._view(name, tensor) for name, tensor in experts.items()}

    def _view(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        expert_bytes = tensor[0].numel() * tensor.element_size()
        layout = tensor_layout(balanced(len(tensor), 2), expert_bytes, self._memory.page_bytes)
        placed, made = [], []
        for rank, span in enumerate(layout.segments):
            if not span.nbytes:
                continue
            block = self._memory.create(span.nbytes)
            made.append(block)
            if rank == 1:
                handle = self._memory.export(block)
                # A peer would get a descriptor of its own, and both ends close theirs.
                handle = os.dup(handle) if isinstance(handle, int) else handle
                block = self._memory.import_handle(handle, span.nbytes)
                made.append(block)
            placed.append((span.offset, block))
        spec = TensorSpec(ExpertTensor(name, tensor.dtype, tuple(tensor.shape[1:]), replicated=False), layout)
        view = View(self._memory, spec, placed)
        for block in made:  # the view holds the memory
            block.close()
        view.bytes.copy_(tensor.reshape(-1).view(torch.uint8))
        self._open.append(view)
        return view.tensor

    def close(self) -> None:
        """Unmap."""
        for view in self._open:
            view.close()
        self._open = []


def kernels_of(shape: Shape, weight_format: str, experts: Experts) -> dict[str, Callable[[], tuple[Kernel, Experts]]]:
    """By name, what makes a kernel and the experts that it reads."""

    def flashinfer() -> tuple[Kernel, Experts]:
        flashinfer_modules.install()
        # Its first call would compile for as long as everything else takes.
        if not flashinfer_modules.ready(weight_format):
            raise RuntimeError(f"not built: python kernels/build.py --format {weight_format}")
        prepared = moe.for_flashinfer(weight_format, experts)
        return lambda case, given: moe.run_flashinfer(weight_format, case, given), prepared

    def triton() -> tuple[Kernel, Experts]:
        given = moe.as_bf16(weight_format, experts) if weight_format == "mxfp4" else experts
        return lambda case, held: moe.run_triton(weight_format, case, held), given

    name = "Triton (bf16 copies)" if weight_format == "mxfp4" else "Triton"
    made: dict[str, Callable[[], tuple[Kernel, Experts]]] = {"FlashInfer": flashinfer, name: triton}
    if weight_format == "fp8-block":
        made["DeepGEMM"] = lambda: (deep_gemm(shape), experts)
    return made


def tuning(kernel: str, tokens: Sequence[int]) -> AbstractContextManager[object]:
    """FlashInfer's first call in it tunes for all these numbers of tokens."""
    if kernel != "FlashInfer":
        return nullcontext()
    from flashinfer.autotuner import autotune

    tuner: AbstractContextManager[object] = autotune(True, tuning_buckets=tuple(sorted(tokens)))
    return tuner


def turns_ms(runs: Sequence[Callable[[], object]]) -> list[float]:
    """The median milliseconds of each, of rounds in which they take turns, since clocks drift."""
    from triton.testing import do_bench

    rounds = [[float(do_bench(run, return_mode="median")) for run in runs] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def measure(
    shape: Shape, weight_format: str, tokens: list[int], end: float, add: Callable[[dict[str, Any]], None]
) -> None:
    """All rows of one layer; `add` takes each."""
    experts = moe.make(weight_format, shape)
    for name, prepare in kernels_of(shape, weight_format, experts).items():
        row: dict[str, Any] = {"model": shape.name, "format": weight_format, "kernel": name}
        views, left = Views(), list(tokens)
        try:
            kernel, resident = prepare()
            on_view = views.of(resident)
            with tuning(name, tokens):
                kernel(moe.make_case(shape, max(tokens)), resident)
            while left:
                if time.monotonic() > end:
                    raise TimeoutError("not measured: no time left")
                case = moe.make_case(shape, left[0])
                here, there = turns_ms([partial(kernel, case, held) for held in (resident, on_view)])
                add(row | {"tokens": left.pop(0), "resident_ms": here, "view_ms": there})
        except Exception as error:  # noqa: BLE001  (a kernel that is missing must not end the comparison)
            for count in left:
                add(row | {"tokens": count, "error": f"{type(error).__name__}: {error}"[:300]})
        finally:
            views.close()
            resident = on_view = {}
            torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    """A row of a Markdown table."""
    if "error" in row:
        figures = [row["error"].split("\n")[0][:80].replace("|", "/")]
    else:
        over = row["view_ms"] / row["resident_ms"] - 1
        figures = [f"{row['resident_ms']:.3f} ms", f"{row['view_ms']:.3f} ms on a view", f"{over:+.1%}"]
    return "| " + " | ".join([row["model"], row["format"], row["kernel"], str(row["tokens"]), *figures]) + " |\n"


def main() -> None:
    """Measure, write JSON, print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 1024, 64, 8, 1])
    parser.add_argument("--time-limit", type=float, default=600, metavar="SECONDS")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("it needs a Hopper GPU")
    end = time.monotonic() + args.time_limit
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        sys.stdout.write(line(row))

    with published():
        for name in args.shapes:
            measure(*LAYERS[name], args.tokens, end, add)


if __name__ == "__main__":
    main()
