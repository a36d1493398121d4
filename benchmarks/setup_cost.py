"""What sharing DeepSeek-R1's layers takes: python -m benchmarks.setup_cost RANKS TRANSPORT; an expert is two pages."""

import multiprocessing
import os
import sys
import time
from typing import Any

import torch

from benchmarks.links.layer import PlainLayer, Tensors
from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.memory import memory_for
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.places import TcpPlace
from sglang_dwdp.runtime import DwdpRuntime

BYTES = {"w13_weight": 4096, "w2_weight": 4096, "w13_weight_scale_inv": 64, "w2_weight_scale_inv": 32}  # of an expert
open_files: list[int] = []


class Layer(PlainLayer):
    def is_weight(self, name: str) -> bool:
        return not name.endswith("scale_inv")

    def bind(self, tensors: Tensors) -> None:
        open_files.append(len(os.listdir("/proc/self/fd")))


def run(rank: int, size: int, transport: str, name: str, place: TcpPlace, results: Any) -> None:
    sent, send, placement = [], Exchange._send, balanced(256, size)
    Exchange._send = lambda *args: (sent.append(1), send(*args))[1]  # type: ignore[method-assign]
    shards = {name: torch.ones(len(placement.shard(rank)), nbytes, dtype=torch.uint8) for name, nbytes in BYTES.items()}
    layers, started = [Layer(placement, shards) for _ in range(58)], time.process_time()
    for number, layer in enumerate(layers):
        layer.layer_id = number
    runtime = DwdpRuntime(DwdpConfig(), memory_for("cpu", 0, transport), rank, size)
    runtime.setup(layers, name, place if transport == "host-path" else None)
    found = {"messages": len(sent), "open_files": max(open_files), "cpu_s": time.process_time() - started}
    results.put(found | runtime.report())


if __name__ == "__main__":
    size, transport = int(sys.argv[1]), sys.argv[2]
    context, place, name = multiprocessing.get_context("fork"), TcpPlace.open("127.0.0.1"), str(os.getpid())
    torch.set_num_threads(1)
    results = context.SimpleQueue()
    for rank in range(size):
        context.Process(target=run, args=(rank, size, transport, name, place, results)).start()
    found = [results.get() for _ in range(size)]
    for what, of_all in (("messages", sum), ("open_files", max), ("setup_s", max), ("cpu_s", max)):
        sys.stdout.write(f"{what} ({of_all.__name__} of {size} ranks): {of_all(one[what] for one in found):.10g}\n")
