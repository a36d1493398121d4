"""Runs SGLang's CPU engine on a machine without a GPU, so that tests and the demo can use it.

SGLang's CPU engine is for processors with Intel AMX and one rank per NUMA node. Anywhere else it needs a few
environment variables, and a stub of a package that wants the CUDA driver. All of them have to be there before SGLang
is imported, in every process of a server.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

# A directory of stubs; not a package, so nothing can import it by way of sglang_dwdp.
STUBS = Path(__file__).resolve().parent / "stubs"
_arranged: dict[str, str] = {}


def needed(device: str | None) -> bool:
    """Whether a server runs on the CPU engine.

    SGLang itself asks for both `--device cpu` and an environment variable. One is enough here; a device other than
    the CPU that was asked for by name wins over the variable.

    Args:
        device: the value of `--device`; None: not given.
    """
    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" if device is None else device == "cpu"


def default_flags() -> dict[str, str | int]:
    """Server arguments for the CPU engine; a plugin sets those that the user left open."""
    return {
        "device": "cpu",
        # On x86 SGLang's default is intel_amx, which imports kernels that need AMX.
        "attention_backend": "torch_native",
        # Every rank would take most of the machine's memory for its cache and fill it with zeros:
        # SGLang cannot tell a rank's share once the cores are divided by hand, and says so.
        "max_total_tokens": 32768,
    }


def environment(num_ranks: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables to add for a server.

    Args:
        num_ranks: of the server.
        base: the variables to add to; None: this process's. What is set there stays as it is and is not in the
            result, except for PYTHONPATH, which a folder is put in front of.

    Raises:
        ValueError: the server has no ranks.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}: a server has at least one rank")
    base = os.environ if base is None else base
    wanted = {
        # Without it `--device cpu` still picks the CUDA platform, which cannot start.
        "SGLANG_USE_CPU_ENGINE": "1",
        # PyNccl loads the NCCL that pip installed with torch and then fails on a CPU device. A
        # library that cannot be loaded makes it step aside; the collectives go through gloo.
        "SGLANG_NCCL_SO_PATH": "/nonexistent/libnccl.so.2",
        # Ranks share the host's memory. Where another process takes some between their looks at it, SGLang would end.
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    }
    cores = sorted(os.sched_getaffinity(0))
    if num_ranks > numa_nodes(cores):
        # SGLang rejects more ranks than NUMA nodes unless it is told every rank's cores. Where its
        # own division by nodes works it is better: it knows hyper-threads and each node's memory.
        wanted["SGLANG_CPU_OMP_THREADS_BIND"] = thread_binding(num_ranks, cores)
        # Without AMX SGLang checks that binding but does not apply it, so every rank would compute
        # with a thread for each core of the machine, and wait for the others' threads.
        wanted["OMP_NUM_THREADS"] = str(max(1, len(cores) // num_ranks))
    additions = {name: value for name, value in wanted.items() if not base.get(name)}

    path = base.get("PYTHONPATH", "")
    if not has_cuda_driver() and str(STUBS) not in path.split(os.pathsep):
        # sgl_kernel's shared objects are linked against the driver, so SGLang's imports fail.
        additions["PYTHONPATH"] = os.pathsep.join(part for part in (str(STUBS), path) if part)
    return additions


def arrange(num_ranks: int) -> None:
    """Apply `environment` to this process, and so to the children that it starts.

    Call it before anything imports `sglang.srt`: SGLang reads the variables when it is imported. Servers do so by
    themselves; a program that uses `sglang.Engine` on a machine without the CUDA driver has to, because SGLang imports
    its kernels there before it loads plugins.
    """
    # What an earlier call set was not set by the user: the next server may have another number of ranks.
    additions = environment(num_ranks, {name: v for name, v in os.environ.items() if _arranged.get(name) != v})
    os.environ.update(additions)
    _arranged.update({name: value for name, value in additions.items() if name != "PYTHONPATH"})
    # PYTHONPATH is read when an interpreter starts: for this one the directory goes on sys.path.
    if not has_cuda_driver() and str(STUBS) not in sys.path:
        sys.path.insert(0, str(STUBS))


def thread_binding(num_ranks: int, cores: list[int]) -> str:
    """One entry of cores per rank, as SGLang wants them: `0,1|2,3` for two ranks on four cores.

    Ranks get contiguous shares of the cores. With fewer cores than ranks they take turns, one each.
    """
    if num_ranks > len(cores):
        return "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))
    bounds = [rank * len(cores) // num_ranks for rank in range(num_ranks + 1)]
    shares = [cores[bounds[rank] : bounds[rank + 1]] for rank in range(num_ranks)]
    return "|".join(",".join(str(core) for core in share) for share in shares)


def numa_nodes(cores: list[int]) -> int:
    """How many NUMA nodes these cores are on; 1 where the system does not say."""
    nodes = Path("/sys/devices/system/node").glob("node[0-9]*")
    return max(1, sum(any((node / f"cpu{core}").exists() for core in cores) for node in nodes))


@cache
def has_cuda_driver() -> bool:
    """Whether libcuda.so.1 can be loaded: what the installed sgl_kernel needs to be imported."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
