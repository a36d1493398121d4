"""Measure a profile on this machine's GPUs, with PyTorch.

One GPU gives the compute part, and copies within it; with more, every GPU copies from every peer, and from
all at once, alone and under compute, and multiplies with weights in every peer's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .copies import TorchCopyBench, measure_copies
from .errors import PlannerError
from .gpus import gpu_of_device
from .profile import AttentionPoint, GemmPoint, Profile, ReadPoint, SmallPoint
from .reads import TorchReadBench, measure_reads
from .shape import ModelShape


def measure(model: ModelShape, quick: bool = False, device: str | None = None) -> Profile:
    """Measure on this machine; takes seconds on one GPU, about a minute on eight.

    Raises:
        PlannerError: without torch or a GPU (``device="cpu"`` measures the CPU, for tests), on a GPU
            that lacks a kernel, or without the memory for it.
    """
    try:
        import torch
    except ImportError:
        raise PlannerError("measuring needs PyTorch with a GPU; it is not installed") from None
    if device is None and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "" if built else " (this PyTorch is built for the CPU only)"
        raise PlannerError(f"no GPU is visible to PyTorch{why}; run the profile on the machine that will serve")
    try:
        return _measure(torch, model, quick, device or "cuda")
    except torch.OutOfMemoryError as error:
        raise PlannerError(
            f"not enough free GPU memory to measure with {model.name}: {str(error).splitlines()[0]} "
            "Stop what else runs there, or profile with a smaller --model."
        ) from None
    except (RuntimeError, NotImplementedError) as error:
        raise PlannerError(f"the measurement failed: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _measure(torch: Any, model: ModelShape, quick: bool, device: str) -> Profile:
    from .torch_layer import SMALL_KERNELS, TorchLayer, median_seconds, small_elements

    def timed(call: Any) -> float:
        return median_seconds(torch, device, call)

    layer = TorchLayer(model, device)
    sizes = (64, 1024, 4096) if quick else (64, 256, 1024, 2048, 4096, 8192, 16384)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    known = gpu_of_device(name)
    # First, because half a second of it also brings an idle GPU to its working clocks.
    edge = 8192 if device == "cuda" else 256
    a, b = (torch.randn((n, edge), device=device).bfloat16() for n in (2 * edge, edge))
    seconds = median_seconds(torch, device, lambda: a @ b, repeats=200)
    sustained = (GemmPoint(2 * edge, 1, edge, edge, seconds),)
    grouped: list[GemmPoint] = []
    dense: list[GemmPoint] = []
    small: list[SmallPoint] = []
    for count in sizes:
        x = layer.tokens(count)
        cos, sin = layer.angles(count)
        scores = x @ layer.router
        _, order, ends = layer.route(scores)
        rows = x[order // model.top_k]
        both = layer.grouped(rows, layer.up, ends)
        middle = layer.activate(both)
        for a, b in ((rows, layer.up), (middle, layer.down)):
            seconds = timed(lambda a=a, b=b, ends=ends: layer.grouped(a, b, ends))
            grouped.append(GemmPoint(a.shape[0], model.experts, b.shape[1], b.shape[2], seconds))
        qkv = x @ layer.qkv
        wide = layer.torch.randn(count, layer.out.shape[0], device=device).bfloat16()
        for a, b in ((x, layer.qkv), (wide, layer.out)):
            seconds = timed(lambda a=a, b=b: a @ b)
            dense.append(GemmPoint(count, 1, b.shape[0], b.shape[1], seconds))
        out = layer.grouped(middle, layer.down, ends)
        inputs = (x, qkv, scores, both, out, cos, sin)
        seconds = timed(lambda inputs=inputs: layer.small(*inputs))
        small.append(SmallPoint(count, count * small_elements(model) * 2.0, SMALL_KERNELS, seconds))
    attention: list[AttentionPoint] = []
    shapes = [(h, d) for h in (max(1, model.heads // 2), model.heads, 2 * model.heads) for d in (64, 128)]
    for heads, dim in shapes:
        for length in (n for n in sizes if n >= 1024):
            kv_heads = max(1, heads * model.kv_heads // model.heads)
            q = torch.randn((1, heads, length, dim), device=device).bfloat16()
            k = torch.randn((1, kv_heads, length, dim), device=device).bfloat16()
            seconds = timed(lambda q=q, k=k: layer.attend(q, k, k))
            attention.append(AttentionPoint(length, heads, kv_heads, dim, seconds))
    copies = measure_copies(TorchCopyBench(torch)) if device == "cuda" else ()
    reads, reads_failed = _reads(torch, model, timed) if device == "cuda" else ((), "")
    return Profile(
        gpu=known.name if known else "unknown",
        device=name,
        torch=str(torch.__version__),
        model=model.name,
        grouped=tuple(grouped),
        dense=tuple(dense),
        sustained=sustained,
        attention=tuple(attention),
        small=tuple(small),
        copies=tuple(copies),
        reads=tuple(reads),
        reads_failed=reads_failed,
    )


def _reads(
    torch: Any, model: ModelShape, timed: Callable[[Callable[[], Any]], float]
) -> tuple[Sequence[ReadPoint], str]:
    """(points, why there are none). The rest of a profile is worth having without them."""
    try:
        return measure_reads(TorchReadBench(torch, model, timed)), ""
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        return (), (str(error) or type(error).__name__).splitlines()[0]
