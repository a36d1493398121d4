"""Programs that look at one thing each, in processes of their own: whatever fails there, the doctor goes on.

`python -m sglang_dwdp.doctor.probes NAME ARGUMENTS` prints its answer as JSON, in a line that begins with MARK.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from itertools import permutations
from typing import Any

from sglang_dwdp.config import MIB, TRANSPORTS
from sglang_dwdp.doctor.facts import Copy, Gpu, Kernels
from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.memory.base import Memory
from sglang_dwdp.memory.crossing import check_crossing
from sglang_dwdp.memory.handshake import Exchange

MARK = "sglang-dwdp probe: "
EXCHANGE_S = 60.0  # longest wait for another process of a trial
_SLICE_BYTES = 32 * MIB
_BLOCK_BYTES = {"cuda": 512 * MIB, "cpu": MIB}
_REPEATS = 5
_STEP = 4096  # of the copied bytes that are compared


def gpus() -> dict[str, Any]:
    """Driver, GPUs, links, and which GPU reaches which."""
    import torch

    count = torch.cuda.device_count()
    pairs = [pair for pair in permutations(range(count), 2) if not torch.cuda.can_device_access_peer(*pair)]
    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "no_peer_access": pairs, "gpus": []}
    nvml: Any = None
    with suppress(Exception):  # no driver, or no NVML: then torch alone has to do
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        number = nvml.nvmlSystemGetCudaDriverVersion_v2()
        found["driver"] = nvml.nvmlSystemGetDriverVersion()
        found["driver_cuda"] = f"{number // 1000}.{number % 1000 // 10}"
    for index in range(count):
        properties, links = torch.cuda.get_device_properties(index), None
        with suppress(Exception):
            links = _links_up(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}"))
        found["gpus"].append(asdict(Gpu(properties.name, properties.major, links)))
    return found


def _links_up(nvml: Any, handle: Any) -> int:
    up = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            up += nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED
        except nvml.NVMLError:  # there is no such link
            break
    return up


def software() -> dict[str, Any]:
    """The sources of SGLang that hooks are put on, and FlashInfer's kernels."""
    from sglang_dwdp.support import ledger

    importlib.import_module("sglang.srt")  # if there is none, that is the answer
    found: dict[str, Any] = {"changed": ledger.changed(ledger.entries())}
    with suppress(ImportError):
        found["kernels"] = asdict(_kernels())
    return found


def _kernels() -> Kernels:
    import flashinfer

    from sglang_dwdp.block_fp8 import run_time_compiler
    from sglang_dwdp.support.flashinfer_modules import FORMATS, ready

    all_to_all = False
    with suppress(Exception):  # as in `ready`: FlashInfer may find no toolkit that it could describe a build for
        from flashinfer.jit.comm import gen_moe_alltoall_module

        all_to_all = bool(gen_moe_alltoall_module().is_compiled)
    return Kernels(flashinfer.__version__, list(filter(ready, FORMATS)), all_to_all, run_time_compiler(os.environ))


def share(transport: str, rank: str, size: str, gpu_count: str, group: str) -> dict[str, Any]:
    """One process of a trial: make memory, hand it out, get the others', copy it, compare it."""
    from sglang_dwdp.memory import memory_for

    exchange = Exchange(group, int(rank), int(size), EXCHANGE_S)
    with ExitStack() as stack:
        stack.callback(exchange.close)
        exchange.connect()
        try:
            device = TRANSPORTS[transport].device
            index = int(rank) % max(int(gpu_count), 1)
            if transport == "cuda-fabric":
                from sglang_dwdp.memory.cuda_fabric import fabric_state

                make = partial(memory_for, device, index, transport)
                check_crossing(transport, make, exchange, lambda: fabric_state(index))
            memory = memory_for(device, index, transport)
            return {"copies": [asdict(copy) for copy in _copies(memory, _BLOCK_BYTES[device], exchange)]}
        except Exception as error:
            exchange.fail(str(error))
            raise


def _copies(memory: Memory, nbytes: int, exchange: Exchange) -> list[Copy]:
    import torch

    from sglang_dwdp.memory.handles import swap_blocks

    nbytes = -(-nbytes // memory.page_bytes) * memory.page_bytes
    copies = []
    with ExitStack() as stack:
        data = []
        for (block,) in swap_blocks(memory, exchange, [[nbytes]] * exchange.size, stack)[0]:
            if not memory.maps:
                data.append(block.tensor())
                continue
            pages = memory.reserve(nbytes)
            stack.callback(pages.close)
            pages.map(0, block)
            data.append(pages.tensor(nbytes))
        data[exchange.rank].fill_(exchange.rank + 1)
        memory.finish_writes()
        target = torch.zeros_like(data[exchange.rank])
        for reader, source in permutations(range(exchange.size), 2):
            exchange.barrier()  # one pair at a time; before the first, all have written
            if reader == exchange.rank:
                copies.append(Copy(reader, source, nbytes / _seconds(memory, target, data[source])))
                if not bool((target[::_STEP] == source + 1).all()):
                    raise ValueError(f"rank {reader} read other bytes than rank {source} wrote")
        exchange.barrier()  # nobody reads any more
    return copies


def _seconds(memory: Memory, target: Any, source: Any) -> float:
    """The shortest of some copies, by the runtime's copy engine."""
    engine = memory.copy_engine(EXCHANGE_S)
    starts = range(0, source.numel(), _SLICE_BYTES)
    plan = engine.prepare([(target[at : at + _SLICE_BYTES], source[at : at + _SLICE_BYTES]) for at in starts])
    released, filled = engine.event(), engine.event()
    seconds = []
    for _ in range(_REPEATS):
        memory.finish_writes()
        started = time.perf_counter()
        engine.record(released)
        engine.fill(plan, released, filled)
        engine.wait(filled)
        memory.finish_writes()
        seconds.append(time.perf_counter() - started)
    engine.close()
    return min(seconds)


_PROBES: Mapping[str, Callable[..., dict[str, Any]]] = {"gpus": gpus, "software": software, "share": share}

if __name__ == "__main__":
    try:
        answer = _PROBES[sys.argv[1]](*sys.argv[2:])
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the answer)
        # Of a trial, the process that failed by itself says why; its peers only that it did.
        answer = {"error": f"{type(error).__name__}: {error}", "is_peers": isinstance(error, DwdpSetupError)}
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
