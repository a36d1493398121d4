"""A group of ranks in one process: each rank is a thread, with layers that need no SGLang."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.memory.base import Handle, Memory
from sglang_dwdp.memory.host_shm import HostBlock, HostMemory, HostRange
from sglang_dwdp.placement import balanced
from sglang_dwdp.runtime import DwdpRuntime

Experts = Mapping[str, torch.Tensor]  # full tensors [num_experts, …] of one layer, as in a checkpoint


class PlainLayer:
    """An `ExpertLayer` that holds its tensors in a dict."""

    def __init__(self, layer_id: int, full: Experts, rank: int, size: int) -> None:  # on the device of `full`
        self.layer_id = layer_id
        num_experts = len(next(iter(full.values())))
        self.placement = balanced(num_experts, size)
        shard = self.placement.shard(rank)
        self.tensors = {name: tensor[shard.start : shard.stop].clone() for name, tensor in full.items()}
        self.bound = False

    def shards(self) -> Experts:
        return self.tensors

    def is_weight(self, name: str) -> bool:
        return name.startswith("w")

    def bind(self, tensors: Experts) -> None:
        self.tensors = dict(tensors)
        self.bound = True

    def use(self, tensors: Experts) -> None:
        self.tensors.update(tensors)


def cuda_memory() -> Memory:
    """Memory of GPU 0, for ranks that share it."""
    from sglang_dwdp.memory.cuda_vmm import CudaMemory

    return CudaMemory(0)


def cuda_ipc_memory() -> Memory:
    """Memory of GPU 0, for ranks that are processes of their own."""
    from sglang_dwdp.memory.cuda_ipc import CudaIpcMemory

    return CudaIpcMemory(0)


class _UnmappedBlock:
    """A memory file, mapped once at an address of its own."""

    def __init__(self, block: HostBlock, nbytes: int) -> None:
        self.block, self.nbytes = block, nbytes
        self._pages = HostRange(block.nbytes)
        self._pages.map(0, block)

    def tensor(self) -> torch.Tensor:
        return self._pages.tensor(self.nbytes)

    def close(self) -> None:
        self._pages.close()
        self.block.close()


class UnmappedMemory(HostMemory):
    """Host memory that behaves as CUDA IPC's: blocks have addresses of their own, and cannot be mapped elsewhere."""

    page_bytes = 1
    maps = False

    @staticmethod
    def _whole(nbytes: int) -> int:
        return -(-nbytes // HostMemory.page_bytes) * HostMemory.page_bytes

    def create(self, nbytes: int) -> Any:
        self.page_bytes = HostMemory.page_bytes
        try:
            return _UnmappedBlock(super().create(self._whole(nbytes)), nbytes)
        finally:
            self.page_bytes = 1

    def export(self, block: Any) -> Handle:
        return super().export(block.block)

    def import_handle(self, handle: Handle, nbytes: int) -> Any:
        return _UnmappedBlock(super().import_handle(handle, self._whole(nbytes)), nbytes)

    def reserve(self, nbytes: int) -> Any:
        raise TypeError("cannot be mapped")


@dataclass(frozen=True)
class Kind:
    """A kind of memory that tests run with."""

    memory: Callable[[], Memory]
    device: str


HOST = Kind(HostMemory, "cpu")
UNMAPPED = Kind(UnmappedMemory, "cpu")
CUDA = Kind(cuda_memory, "cuda:0")
CUDA_IPC = Kind(cuda_ipc_memory, "cuda:0")
KINDS = [
    pytest.param(HOST, id="host"),
    pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu(4)),
]


def checkpoint(
    num_layers: int, num_experts: int, tails: Mapping[str, tuple[int, ...]], device: str = "cpu"
) -> list[Experts]:
    """Random full tensors: bf16 for weights ("w…"), float32 for the rest."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        {
            name: torch.randn(num_experts, *tail, generator=generator, device=device).to(
                torch.bfloat16 if name.startswith("w") else torch.float32
            )
            for name, tail in tails.items()
        }
        for _ in range(num_layers)
    ]


def run_ranks(
    size: int,
    full: Sequence[Experts],
    step: Callable[[DwdpRuntime, list[PlainLayer]], Any],
    config: DwdpConfig | None = None,
    memory: Callable[[int], Memory] | None = None,
    layers_of: Callable[[int], list[PlainLayer]] | None = None,
) -> list[Any]:
    """Set up a runtime on every rank, run `step` there, close; the results, or the exceptions, in rank order.

    memory: of a rank; by default of the kind that `full` lies in.
    """
    name = uuid.uuid4().hex
    kind = CUDA if next(iter(full[0].values())).is_cuda else HOST
    config = config or DwdpConfig(timeout_s=20)

    def one(rank: int) -> Any:
        runtime = DwdpRuntime(config, memory(rank) if memory else kind.memory(), rank, size)
        layers = (
            layers_of(rank)
            if layers_of
            else [PlainLayer(3 * i + 1, experts, rank, size) for i, experts in enumerate(full)]
        )
        try:
            runtime.setup(layers, name)
            return step(runtime, layers)
        except Exception as error:  # noqa: BLE001  (it is the result)
            return error
        finally:
            runtime.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def forward(runtime: DwdpRuntime, layers: Sequence[PlainLayer], num_tokens: int) -> list[dict[str, torch.Tensor]]:
    """What each layer sees in one forward, copied while it may be read."""
    seen = []
    runtime.begin_forward(num_tokens)
    runtime.prime()
    for layer in layers:
        runtime.wait(layer.layer_id)
        seen.append({name: tensor.clone() for name, tensor in layer.tensors.items()})
        runtime.release(layer.layer_id)
    runtime.end_forward(num_tokens)
    return seen


def equal(seen: Sequence[Experts], full: Sequence[Experts]) -> bool:
    """Bitwise equality of all layers and tensors."""
    return all(
        seen_layer.keys() == layer.keys()
        and all(torch.equal(seen_layer[name].view(torch.uint8), layer[name].view(torch.uint8)) for name in layer)
        for seen_layer, layer in zip(seen, full, strict=True)
    )


def open_resources() -> tuple[int, int]:
    """Open descriptors, and mappings of this package's memory files."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("sglang-dwdp")


GPU_TABLES = 32 << 20  # what the driver may keep for its own tables


def gpu_bytes() -> int:
    """Memory in use on GPU 0, torch's cache excepted; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    gc.collect()  # of tensors in cycles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
