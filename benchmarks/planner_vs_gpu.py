"""Products and attention of a model's layer on this machine's GPU, beside what the planner says of them.

    python benchmarks/planner_vs_gpu.py [MODEL ...] [--gpu H100] [--json FILE] [--gpu-file FILE]

bf16, PyTorch's kernels. `--gpu-file` gets the fractions of peak that the largest problems reached, for `sglang-dwdp
plan --gpu-file`; copies between GPUs are measured by `gpu_links.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sglang_dwdp.planner import kernels
from sglang_dwdp.planner.formats import FORMATS
from sglang_dwdp.planner.gpus import Gpu, get_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.shape import ModelShape

SIZES = (64, 256, 1024, 2048, 4096, 8192, 16384)  # tokens


@dataclass(frozen=True)
class Problem:
    """A product of [rows, depth] with each of `experts` matrices [depth, width], or causal attention.

    kind: `dense`; `grouped`: the rows are spread evenly over the experts; `attention`: one sequence of `rows`
    tokens, `experts` heads of `depth`, `width` of them with keys and values of their own.
    """

    kind: str
    rows: int
    experts: int
    depth: int
    width: int

    @property
    def flops(self) -> float:
        """Without padding."""
        if self.kind == "attention":
            return 2.0 * self.rows * (self.rows + 1) * self.experts * self.depth
        return 2.0 * self.rows * self.depth * self.width

    def predicted(self, gpu: Gpu) -> float:
        """Seconds, by the planner."""
        if self.kind == "attention":
            return self.flops / (gpu.peak(FORMATS["bf16"]) * gpu.efficiency.attention)
        if self.kind == "dense":
            return kernels.dense_gemm(gpu, FORMATS["bf16"], self.rows, self.depth * self.width)
        return kernels.grouped_product(gpu, FORMATS["bf16"], self.rows, self.experts, self.depth, self.width)

    def measured(self, device: str) -> float:
        """Median seconds of a call, calls in a row."""

        def drawn(*shape: int) -> Any:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        if self.kind == "attention":
            tensors = [drawn(1, heads, self.rows, self.depth) for heads in (self.experts, self.width, self.width)]
            call = lambda: functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)  # noqa: E731
        elif self.kind == "dense":
            x, weights = drawn(self.rows, self.depth), drawn(self.depth, self.width)
            call = lambda: x @ weights  # noqa: E731
        else:
            x, weights = drawn(self.rows, self.depth), drawn(self.experts, self.depth, self.width)
            ends = torch.linspace(0, self.rows, self.experts + 1, device=device)[1:].round().int()
            call = lambda: functional.grouped_mm(x, weights, offs=ends)  # noqa: E731
        return float(Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.1).median)


def problems(model: ModelShape, sizes: tuple[int, ...]) -> list[Problem]:
    """Of one layer, by tokens."""
    qkv = (model.heads + 2 * model.kv_heads) * model.qk_dim
    found = []
    for tokens in sizes:
        rows = tokens * model.top_k
        found += [
            Problem("dense", tokens, 1, model.hidden, qkv),
            Problem("dense", tokens, 1, model.heads * model.v_dim, model.hidden),
            Problem("grouped", rows, model.experts, model.hidden, 2 * model.moe_intermediate),
            Problem("grouped", rows, model.experts, model.moe_intermediate, model.hidden),
            Problem("attention", tokens, model.heads, model.qk_dim, model.kv_heads),
        ]
    return found


def fractions(points: list[tuple[Problem, float]], gpu: Gpu) -> dict[str, float]:
    """Fractions of the matrix peak that the largest problem of each kind reached."""
    found = {}
    for kind, name in {"dense": "dense_gemm", "grouped": "grouped_gemm", "attention": "attention"}.items():
        problem, seconds = max((p for p in points if p[0].kind == kind), key=lambda p: p[0].flops)
        fraction = problem.flops / seconds / gpu.peak(FORMATS["bf16"])
        if kind == "grouped":  # the planner takes a short inner dimension into account itself
            fraction *= (problem.depth + gpu.efficiency.half_depth) / problem.depth
        found[name] = float(f"{min(1.0, fraction):.4g}")
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["qwen3-30b-a3b"], help="as of `sglang-dwdp plan`, without MLA")
    parser.add_argument("--gpu", default="H100", help="whose data-sheet figures to use (default H100)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all points")
    parser.add_argument("--gpu-file", type=Path, metavar="FILE", help="write the fractions reached")
    args = parser.parse_args()
    gpu = get_gpu(args.gpu)
    points = []
    for name in args.models:
        for problem in problems(load_model(name), tuple(args.tokens)):
            seconds = problem.measured(args.device)
            points.append((problem, seconds))
            ratio = problem.predicted(gpu) / seconds
            shape = " x ".join(map(str, list(asdict(problem).values())[1:]))
            sys.stdout.write(f"{problem.kind:<10}{shape:<34}{seconds * 1e3:9.3f} ms, predicted {ratio:.2f} of it\n")
    if args.json:
        rows = [[*asdict(problem).values(), float(f"{seconds:.4g}")] for problem, seconds in points]
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    if args.gpu_file:
        args.gpu_file.write_text(yaml.safe_dump({"efficiency": fractions(points, gpu)}))


if __name__ == "__main__":
    main()
