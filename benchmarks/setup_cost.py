"""What sharing DeepSeek-R1's 58 layers takes, apart from the bytes: `setup_cost.py RANKS [host-shm | host-path]`.

Real processes, handles and mappings on one host; an expert of each weight has one page, and its scales are small.
"""

import json
import multiprocessing
import os
import sys
import time
import uuid
from typing import Any

import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.experts.placement import balanced
from sglang_dwdp.memory import memory_for
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.places import TcpPlace
from sglang_dwdp.runtime import DwdpRuntime

LAYERS, EXPERTS = 58, 256
BYTES = {"w13_weight": 4096, "w2_weight": 4096, "w13_weight_scale_inv": 64, "w2_weight_scale_inv": 32}  # of an expert


class Layer:
    def __init__(self, layer_id: int, rank: int, size: int, most: list[int]) -> None:
        self.layer_id, self.placement, self.most = layer_id, balanced(EXPERTS, size), most
        own = len(self.placement.shard(rank))
        self.tensors = {name: torch.full((own, nbytes), rank, dtype=torch.uint8) for name, nbytes in BYTES.items()}

    def shards(self) -> Any:
        return self.tensors

    def is_weight(self, name: str) -> bool:
        return not name.endswith("scale_inv")

    def bind(self, tensors: Any) -> None:
        self.tensors = dict(tensors)
        self.most[0] = max(self.most[0], len(os.listdir("/proc/self/fd")))

    use = bind


def run(rank: int, size: int, transport: str, name: str, place: TcpPlace, results: Any) -> None:
    sent, most = [0], [0]
    send = Exchange._send

    def counted(*args: Any) -> None:
        sent[0] += 1
        send(*args)

    Exchange._send = counted  # type: ignore[method-assign]
    started = time.process_time()
    runtime = DwdpRuntime(DwdpConfig(), memory_for("cpu", 0, transport), rank, size)
    runtime.setup(
        [Layer(i, rank, size, most) for i in range(LAYERS)], name, place if transport == "host-path" else None
    )
    results.put((sent[0], most[0], runtime.report()["setup_s"], time.process_time() - started))
    runtime.close()


if __name__ == "__main__":
    size, transport = int(sys.argv[1]), (sys.argv[2:] or ["host-shm"])[0]
    context, place, name = multiprocessing.get_context("fork"), TcpPlace.open("127.0.0.1"), uuid.uuid4().hex
    torch.set_num_threads(1)
    results = context.Queue()
    ranks = [context.Process(target=run, args=(rank, size, transport, name, place, results)) for rank in range(size)]
    for process in ranks:
        process.start()
    sent, most, seconds, cpu = zip(*(results.get() for _ in ranks), strict=True)
    found = {
        "messages": sum(sent),
        "most_by_a_rank": max(sent),
        "open_files": max(most),
        "seconds": max(seconds),
        "cpu_seconds_of_a_rank": max(cpu),
    }
    sys.stdout.write(json.dumps({"ranks": size, "transport": transport, **found}) + "\n")
