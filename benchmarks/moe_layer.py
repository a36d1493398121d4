"""One MoE layer, kernels side by side: FlashInfer, Triton and DeepGEMM, on resident experts and on views.

    python benchmarks/moe_layer.py --out results.json [--shapes qwen r1 gpt-oss] [--tokens 1 8 64 1024 8192]
    python benchmarks/moe_layer.py --docs results.json …     # the table in docs/kernels.md, from files

Needs one Hopper GPU. A view has half of its experts in a block of memory that was exported and imported again, as a
peer's would be; both halves lie on this GPU, so the figures say what mapping costs a kernel, and nothing of NVLink.
FlashInfer's tactics are tuned first, as SGLang does it at start. Each figure is the median of several rounds, in which
resident and view take turns; there are as many as fit into --seconds. A kernel that cannot run is listed with its
error, and what --limit-s leaves no time for is listed as not measured. The file is written after every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

# DeepGEMM would compile kernels for every number of tokens at its first call; here each is compiled when it is used.
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import moe_table
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
from benchmarks.sglang_kernels import deep_gemm, published
from sglang_dwdp.experts.layer import ExpertTensor
from sglang_dwdp.experts.layout import tensor_layout
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.experts.views import TensorSpec, view_of
from sglang_dwdp.memory.cuda import CudaMemory
from sglang_dwdp.support import flashinfer_modules

LAYERS = {
    "qwen-bf16": (QWEN3_30B, "bf16"),
    "qwen-fp8": (QWEN3_30B, "fp8-block"),
    "r1": (DEEPSEEK_R1, "fp8-block"),
    "gpt-oss": (GPT_OSS_120B, "mxfp4"),
}
DOCS = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
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
                handle = self._memory.export(block)
                # A peer would get a descriptor of its own, and both ends close theirs.
                handle = os.dup(handle) if isinstance(handle, int) else handle
                block = self._memory.import_handle(handle, span.nbytes)
                made.append(block)
            placed.append((span.offset, block))
        spec = TensorSpec(ExpertTensor(name, tensor.dtype, tuple(tensor.shape[1:]), replicated=False), layout)
        view = view_of(self._memory, spec, placed)
        for block in made:  # the view holds the memory
            block.close()
        view.bytes.copy_(tensor.reshape(-1).view(torch.uint8))
        self._open.append(view)
        return view.tensor

    def close(self) -> None:
        for view in self._open:
            view.close()
        self._open = []


def median_ms(runs: Sequence[Callable[[], object]], seconds: float) -> tuple[list[float], int]:
    """The median time on the GPU of each of `runs`, and the number of rounds.

    The first call after a synchronization starts on an idle GPU and so includes gaps between launches: it is not
    timed. `runs` take turns in following it, equally often, since of two groups of times the larger one would be the
    median.
    """
    for run in runs:
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for run in runs:
        run()
    torch.cuda.synchronize()
    per_round = (time.perf_counter() - begin) * (len(runs) + 1) / len(runs)
    rounds = 2 * max(3, min(50, round(seconds / per_round / 2)))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in runs]
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        order = list(range(len(runs)))[:: -1 if number % 2 else 1]
        runs[order[-1]]()
        for index in order:
            marks[index][0].record()
            runs[index]()
            marks[index][1].record()
        torch.cuda.synchronize()
        for index in order:
            times[index].append(marks[index][0].elapsed_time(marks[index][1]))
    return [statistics.median(one) for one in times], rounds


def kernels_of(shape: Shape, weight_format: str, experts: Experts) -> dict[str, Callable[[], tuple[Kernel, Experts]]]:
    """By name, what makes a kernel and the experts that it reads."""

    def flashinfer() -> tuple[Kernel, Experts]:
        if not flashinfer_modules.ready(
            weight_format
        ):  # its first call would compile for as long as everything else takes
            raise RuntimeError(f"not built: python kernels/build.py --format {weight_format}")
        prepared = for_flashinfer(weight_format, experts)
        return lambda case, given: run_flashinfer(weight_format, case, given), prepared

    def triton() -> tuple[Kernel, Experts]:
        given = as_bf16(weight_format, experts) if weight_format == "mxfp4" else experts
        return lambda case, held: run_triton(weight_format, case, held), given

    name = "Triton (bf16 copies)" if weight_format == "mxfp4" else "Triton"
    made: dict[str, Callable[[], tuple[Kernel, Experts]]] = {"FlashInfer": flashinfer, name: triton}
    if weight_format == "fp8-block":
        made["DeepGEMM"] = lambda: (deep_gemm(shape), experts)
    return made


@contextmanager
def tuning(kernel: str, tokens: Sequence[int]) -> Iterator[None]:
    """FlashInfer's first call in it tunes for all these numbers of tokens."""
    if kernel != "FlashInfer":
        yield
        return
    from flashinfer.autotuner import autotune

    with autotune(True, tuning_buckets=tuple(sorted(tokens))):
        yield


def measure(
    shape: Shape, weight_format: str, tokens: list[int], seconds: float, deadline: float, add: Callable[..., None]
) -> None:
    """All rows of one layer; `add` takes each."""
    experts = make(weight_format, shape)
    for name, prepare in kernels_of(shape, weight_format, experts).items():
        row: dict[str, Any] = {"model": shape.name, "format": weight_format, "kernel": name}
        views = Views()
        resident: Experts = {}
        on_view: Experts = {}
        runs: list[Callable[[], object]] = []
        left = list(tokens)
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("not measured: out of time")
            kernel, resident = prepare()
            on_view = views.of(resident)
            began = time.monotonic()
            with tuning(name, tokens):
                kernel(make_case(shape, max(tokens)), resident)
                torch.cuda.synchronize()
            prepared_s = time.monotonic() - began
            while left:
                count = left[0]
                if time.monotonic() > deadline:
                    raise TimeoutError("not measured: out of time")
                case = make_case(shape, count)
                runs = [partial(kernel, case, resident), partial(kernel, case, on_view)]
                (here, there), rounds = median_ms(runs, seconds)
                times = {"tokens": count, "resident_ms": here, "view_ms": there, "rounds": rounds}
                add(row | times | {"first_call_s": round(prepared_s, 1)})
                left.pop(0)
        except Exception as error:  # noqa: BLE001  (a kernel that is missing must not end the comparison)
            for count in left:
                add(row | {"tokens": count, "error": f"{type(error).__name__}: {error}"[:500]})
        finally:
            views.close()
            resident = on_view = {}
            runs = []
            torch.cuda.empty_cache()


def main() -> None:
    """Measure, write JSON, print the table; or write the docs' table from files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, nargs="+", metavar="RESULTS", help="write docs/kernels.md's table")
    parser.add_argument("--shapes", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 1024, 64, 8, 1])
    parser.add_argument("--seconds", type=float, default=0.6, help="of measuring, for each figure")
    parser.add_argument("--limit-s", type=float, default=600, help="no new kernel or size is begun after this")
    args = parser.parse_args()
    console = Console(width=160)
    if args.docs:
        try:
            moe_table.insert(DOCS, moe_table.for_docs([json.loads(path.read_text()) for path in args.docs]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--docs takes files that this script wrote: {error!r}")
        return
    if args.out is None:
        parser.error("--out or --docs is needed")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("needs a Hopper GPU")
    deadline = time.monotonic() + args.limit_s
    flashinfer_modules.install()
    rows: list[dict[str, Any]] = []
    content = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    content |= {name: version(package) for name, package in (("sglang", "sglang"), ("flashinfer", "flashinfer-python"))}

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        shown = row.get("error") or f"{row['resident_ms']:.3f} ms, on a view {row['view_ms']:.3f} ms"
        console.print(f"{row['model']} {row['format']} {row['kernel']} {row['tokens']}: {shown}", markup=False)

    with published():
        for name in args.shapes:
            measure(*LAYERS[name], args.tokens, args.seconds, deadline, add)
    console.print(moe_table.for_terminal(rows))
    for verdict in moe_table.verdicts(rows):
        console.print(verdict, markup=False)
    for (model, weights), by_tokens in moe_table.fastest(rows).items():
        console.print(f"fastest for {model} {weights}: {by_tokens}", markup=False)


if __name__ == "__main__":
    main()
