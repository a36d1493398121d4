"""Part b: a grouped product whose experts lie in the peers' memory, read in place through the direct view."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.multi.bench import Bench
from benchmarks.multi.copies import Save
from benchmarks.multi.experts import Shape, SharedLayer
from benchmarks.multi.grouped import Routed, block_rows, route
from benchmarks.multi.together import gathered, together
from sglang_dwdp.memory.handshake import Exchange

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
DRAWS = 4  # routings that take turns: the same experts again would come from the second-level cache


def choose(tokens: int, top_k: int, experts: list[int], seed: int) -> torch.Tensor:
    """`[tokens, top_k]` int64: for each token different ones of `experts`, evenly."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, len(experts), generator=generator)
    return torch.tensor(experts)[scores.topk(min(top_k, len(experts)), dim=1).indices]


class Reads:
    """One rank's products of one number of tokens."""

    def __init__(self, bench: Bench, layer: SharedLayer, shape: Shape, tokens: int) -> None:
        self._bench = bench
        self._peers = layer.direct["w13_weight"]
        self._resident = layer.full["w13_weight"]
        mine = layer.placement.shard(layer.rank)
        remote = [expert for expert in range(shape.experts) if expert not in mine]
        rows = block_rows(tokens, shape.top_k, len(remote))
        draws = DRAWS if tokens <= 128 else 1

        def drawn(experts: list[int]) -> list[Routed]:
            chosen = (choose(tokens, shape.top_k, experts, 100 * layer.rank + seed) for seed in range(draws))
            return [route(each.to(bench.device), rows) for each in chosen]

        self._x = torch.randn(tokens, shape.hidden, device=bench.device).bfloat16()
        self._remote, self._any = drawn(remote), drawn(list(range(shape.experts)))
        expert_bytes = self._peers[0].numel() * self._peers.element_size()
        self.bytes = sum(routed.experts for routed in self._remote) / draws * expert_bytes
        self.traffic = sum(routed.blocks for routed in self._remote) / draws * expert_bytes

    def same(self) -> bool:
        """Whether products with the peers' experts are bitwise those with a resident copy."""
        return all(
            torch.equal(self._grouped(self._peers, routed), self._grouped(self._resident, routed))
            for routed in (*self._remote, *self._any)
        )

    def _grouped(self, weight: torch.Tensor, routed: Routed) -> torch.Tensor:
        return self._bench.grouped(self._x, weight, routed)

    def timers(self) -> dict[str, Any]:
        """By name, what measures the seconds of one product."""
        wanted = {
            "peers": (self._peers, self._remote),
            "resident": (self._resident, self._remote),
            "view, all experts": (self._peers, self._any),
            "resident, all experts": (self._resident, self._any),
        }
        return {
            name: self._bench.timer([lambda w=w, r=r: self._grouped(w, r) for r in routed])  # type: ignore[misc]
            for name, (w, routed) in wanted.items()
        }


def measure(bench: Bench, exchange: Exchange, layer: SharedLayer, shape: Shape, tokens: int) -> dict[str, Any]:
    """One row: every rank alone, then all at once. All ranks call this together."""
    reads = Reads(bench, layer, shape, tokens)
    same = reads.same()
    timers = reads.timers()
    alone = dict.fromkeys(timers, 0.0)
    for rank in range(exchange.size):
        for name, timer in timers.items():
            seconds = together(exchange, timer if rank == exchange.rank else None)
            alone[name] = seconds or alone[name]
    busy = {name: together(exchange, timer) for name, timer in timers.items()}
    mine = {"same": same, "bytes": reads.bytes, "traffic": reads.traffic, "alone_s": alone, "together_s": busy}
    return {"tokens": tokens, "by_rank": gathered(exchange, mine)}


def work(
    bench: Bench, exchange: Exchange, shape: Shape, save: Save, tokens: tuple[int, ...] = TOKENS
) -> dict[str, Any]:
    """All measurements; the same result on every rank. `save` gets what there is, time and again."""
    result: dict[str, Any] = {"ranks": exchange.size, "rows": []}
    result["devices"] = gathered(exchange, bench.name)
    layer = SharedLayer(bench, exchange, shape)
    result["direct_is_right"] = all(gathered(exchange, layer.direct_is_right()))
    save(result)
    for count in tokens:
        result["rows"].append(measure(bench, exchange, layer, shape, count))
        save(result)
    exchange.barrier()
    layer.close()
    return result
