"""Predicted and measured layer times on this machine's GPU.

    python benchmarks/planner_vs_gpu.py --json benchmarks/results/planner_vs_gpu.json

The profile is measured with one model's shape (its products, attention and small kernels, each on
its own); the constants fitted to it predict whole layers of every model, the others being shapes
that the profile has not seen. A layer is bf16 PyTorch: RMS norms, dense products, rotary
embedding, causal attention over one sequence, router, grouped products, weighted sum; timed as the
replay of a CUDA graph, median of 15.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.planner.cost import forward_parts
from sglang_dwdp.planner.fit import fit
from sglang_dwdp.planner.formats import FORMATS, default_precision
from sglang_dwdp.planner.gpu import Gpu
from sglang_dwdp.planner.gpus import GPUS, get_gpu
from sglang_dwdp.planner.measure import measure
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.planner.torch_layer import SMALL_KERNELS, TorchLayer, median_seconds, small_elements
from sglang_dwdp.planner.workload import batch_of


def one_layer(model: ModelShape) -> ModelShape:
    """A single MoE layer with full attention (PyTorch's kernel has no sliding window)."""
    return replace(model, layers=1, dense_layers=0, window=0, window_layers=0)


def predict(model: ModelShape, gpu: Gpu, tokens: int) -> dict[str, float]:
    """Seconds of one bf16 layer over one sequence, by part and in total.

    PyTorch fuses none of the small kernels, so they are counted as ``TorchLayer`` launches them.
    """
    parts = forward_parts(one_layer(model), gpu, default_precision(FORMATS["bf16"]), batch_of([(tokens, 0)]))
    moved = tokens * small_elements(model) * 2.0
    other = moved / (gpu.hbm_bandwidth * gpu.efficiency.elementwise) + SMALL_KERNELS * gpu.kernel_gap
    parts = replace(parts, other=other)
    used = {key: value for key, value in asdict(parts).items() if value}
    return {**used, "total": parts.total}


def measure_layers(model: ModelShape, sizes: list[int], device: str) -> dict[int, float]:
    """Measured seconds of one layer by tokens."""
    import torch

    layer = TorchLayer(one_layer(model), device)
    times = {}
    for count in sizes:
        x = layer.tokens(count)
        cos, sin = layer.angles(count)
        times[count] = median_seconds(torch, device, lambda x=x, cos=cos, sin=sin: layer.forward(x, cos, sin))
    return times


def main() -> int:
    """Profile, predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile-on", default="qwen3-30b-a3b")
    parser.add_argument("--models", nargs="+", default=["qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 8192, 16384])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    profile = measure(load_model(args.profile_on), device=args.device, quick=args.device == "cpu")
    gpu = fit(profile, get_gpu(profile.gpu) if profile.gpu.lower() in GPUS else get_gpu("H100"))
    out = sys.stdout.write
    out(f"{profile.device}, torch {profile.torch}; profiled with {profile.model}\n")
    out(f"fitted: {gpu.efficiency}, kernel gap {gpu.kernel_gap * 1e6:.2f} us\n\n")
    out(f"{'model':<18}{'tokens':>8}{'predicted ms':>14}{'measured ms':>13}{'error':>9}\n")
    rows: list[dict[str, Any]] = []
    for name in args.models:
        model = load_model(name)
        for count, measured in measure_layers(model, args.tokens, args.device).items():
            predicted = predict(model, gpu, count)
            error = predicted["total"] / measured - 1
            rows.append(
                {
                    "model": name,
                    "tokens": count,
                    "predicted": predicted,
                    "measured_seconds": measured,
                    "error": error,
                }
            )
            out(f"{name:<18}{count:>8}{predicted['total'] * 1e3:>14.3f}{measured * 1e3:>13.3f}{error:>+9.1%}\n")
    worst = max(abs(row["error"]) for row in rows)
    mean = sum(abs(row["error"]) for row in rows) / len(rows)
    out(f"mean absolute error {mean:.1%}, worst {worst:.1%}\n")
    if args.json:
        checks = {name: measure(load_model(name), device=args.device).to_json() for name in args.models}
        data = {
            "device": profile.device,
            "torch": profile.torch,
            "profile": profile.to_json(),
            "fitted": {**asdict(gpu.efficiency), "kernel_gap": gpu.kernel_gap},
            "rows": rows,
            "parts_measured": checks,
        }
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except DwdpError as error:
        raise SystemExit(f"planner_vs_gpu: error: {error}") from None
