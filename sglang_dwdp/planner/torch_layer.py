"""One decoder layer in plain PyTorch, cut into the parts that the cost model predicts.

This is the yardstick for `sglang-dwdp profile` and for the comparison of predicted with measured
layer times. torch is imported when a layer is built.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from .errors import PlannerError
from .shape import ModelShape

# Kernels that ``TorchLayer.small`` launches: 14 for the rotations, 6 copies into other layouts, 5
# norms and sums, about 13 for routing, 2 for the activation, 5 to permute and combine.
SMALL_KERNELS = 45


def small_elements(model: ModelShape) -> float:
    """Elements per token that the kernels of ``TorchLayer.small`` read and write, unfused.

    Norms and sums 12 hidden; rotation 9 per query and key element; copies into attention's layout
    and back; gather, scatter, weighting and sum of the routed copies 7 hidden each; activation 5
    intermediate each; scores in fp32 and the sort of the copies' expert numbers.
    """
    q, kv = model.heads * model.qk_dim, model.kv_heads * model.qk_dim
    attention = 9 * (q + kv) + 2 * (q + 2 * kv) + 2 * kv + 2 * q
    copies = model.top_k * (7 * model.hidden + 5 * model.moe_intermediate + 64)
    return 12.0 * model.hidden + attention + copies + 9 * model.experts


class TorchLayer:
    """A bf16 layer: grouped-query attention and a mixture of experts, random weights.

    Latent attention (MLA) is not built; the planner predicts it from the same rates.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, model: ModelShape, device: str) -> None:
        import torch

        if model.mla is not None:
            raise PlannerError(f"{model.name} uses latent attention; profile with a grouped-query model")
        self.torch = torch
        self.model = model
        self.device = device
        m, q, kv = model, model.heads * model.qk_dim, model.kv_heads * model.qk_dim
        generator = torch.Generator(device=device).manual_seed(0)

        def weight(*shape: int) -> Any:
            drawn = torch.empty(*shape, device=device, dtype=torch.bfloat16)
            return drawn.normal_(0.0, shape[-2] ** -0.5, generator=generator)

        self.generator = generator
        self.qkv = weight(m.hidden, q + 2 * kv)
        self.out = weight(q, m.hidden)
        self.router = weight(m.hidden, m.experts)
        self.up = weight(m.experts, m.hidden, 2 * m.moe_intermediate)
        self.down = weight(m.experts, m.moe_intermediate, m.hidden)
        self.gain = torch.ones(m.hidden, device=device, dtype=torch.bfloat16)

    def tokens(self, count: int) -> Any:
        """Random hidden states, shape [count, hidden]."""
        x = self.torch.empty(count, self.model.hidden, device=self.device, dtype=self.torch.bfloat16)
        return x.normal_(0.0, 1.0, generator=self.generator)

    def norm(self, x: Any) -> Any:
        """RMS norm."""
        return self.torch.nn.functional.rms_norm(x, (self.model.hidden,), self.gain)

    def rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        """Rotary embedding of [tokens, heads, dim]."""
        a, b = x.chunk(2, dim=-1)
        return self.torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def angles(self, count: int) -> tuple[Any, Any]:
        """cos and sin tables, [count, 1, dim/2] each."""
        torch, half = self.torch, self.model.qk_dim // 2
        inverse = 10000.0 ** (-torch.arange(half, device=self.device) / half)
        angle = torch.arange(count, device=self.device)[:, None, None] * inverse
        return angle.cos().bfloat16(), angle.sin().bfloat16()

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        """Causal attention; q [1, heads, T, d], k and v [1, kv_heads, T, d]."""
        sdpa = self.torch.nn.functional.scaled_dot_product_attention
        if self.device != "cuda":
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    def grouped(self, x: Any, weights: Any, ends: Any) -> Any:
        """Rows of x, sorted by expert, times each expert's matrix; ``ends`` [experts] int32."""
        torch = self.torch
        if self.device == "cuda":
            public = getattr(torch.nn.functional, "grouped_mm", None)
            call = public or torch._grouped_mm
            return call(x, weights, offs=ends)
        result = x.new_empty(x.shape[0], weights.shape[-1])
        start = 0
        for expert, end in enumerate(ends.tolist()):
            result[start:end] = x[start:end] @ weights[expert]
            start = end
        return result

    def route(self, scores: Any) -> tuple[Any, Any, Any]:
        """(weights [T, k], order of copies by expert [T k], ends [experts]) from router scores."""
        torch, m = self.torch, self.model
        weights, chosen = scores.float().softmax(-1).topk(m.top_k, dim=-1)
        by_expert, order = chosen.flatten().sort()
        experts = torch.arange(m.experts, device=self.device)
        ends = torch.searchsorted(by_expert, experts, right=True).int()
        return (weights / weights.sum(-1, keepdim=True)).bfloat16(), order, ends

    def activate(self, both: Any) -> Any:
        """SwiGLU."""
        gate, up = both.chunk(2, dim=-1)
        return self.torch.nn.functional.silu(gate) * up

    def combine(self, rows: Any, weights: Any, order: Any) -> Any:
        """Back to token order, weighted sum over the copies: [T, hidden]."""
        tokens, k = weights.shape
        back = self.torch.empty_like(rows)
        back[order] = rows
        return (back.view(tokens, k, -1) * weights[..., None]).sum(1)

    def split(self, qkv: Any, cos: Any, sin: Any) -> tuple[Any, Any, Any]:
        """Rotated query and key, and value, as [1, heads, T, d]."""
        m = self.model
        q, k, v = qkv.split([m.heads * m.qk_dim, m.kv_heads * m.qk_dim, m.kv_heads * m.qk_dim], dim=-1)
        q = self.rotate(q.view(-1, m.heads, m.qk_dim), cos, sin)
        k = self.rotate(k.view(-1, m.kv_heads, m.qk_dim), cos, sin)
        v = v.reshape(-1, m.kv_heads, m.qk_dim)
        return tuple(t.transpose(0, 1).contiguous()[None] for t in (q, k, v))

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        """The whole layer for one sequence x [T, hidden]."""
        q, k, v = self.split(self.norm(x) @ self.qkv, cos, sin)
        mixed = self.attend(q, k, v)[0].transpose(0, 1).reshape(x.shape[0], -1)
        x = x + mixed @ self.out
        h = self.norm(x)
        weights, order, ends = self.route(h @ self.router)
        rows = h[order // self.model.top_k]
        rows = self.grouped(self.activate(self.grouped(rows, self.up, ends)), self.down, ends)
        return x + self.combine(rows, weights, order)

    def small(self, x: Any, qkv: Any, scores: Any, both: Any, rows: Any, cos: Any, sin: Any) -> Any:
        """Every kernel of ``forward`` but the products and the attention."""
        q, _, _ = self.split(qkv, cos, sin)
        mixed = q[0].transpose(0, 1).reshape(x.shape[0], -1)
        h = self.norm(self.norm(x) + x)
        weights, order, _ = self.route(scores)
        gathered = h[order // self.model.top_k]
        return self.combine(rows, weights, order) + x, self.activate(both), gathered, mixed


def median_seconds(torch: Any, device: str, call: Callable[[], Any], repeats: int = 15) -> float:
    """Median time of ``call``; on CUDA of replays of a captured graph, which leaves out the host."""
    import time

    for _ in range(2):
        call()
    if device != "cuda":
        times = []
        for _ in range(max(1, repeats // 5)):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # torch's own capture stream is of the GPU that captured first: on another one, nothing would be captured.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del graph
    return statistics.median(times)
