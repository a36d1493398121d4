"""Build times of the slim modules that were built, and of FlashInfer's full module, extrapolated from a sample.

    python benchmarks/build_times.py --out build_times.json [--jobs N] [--each 1]

Sources of the full module are put into kinds; of each kind some are compiled, and their mean processor time stands
for all of the kind. Sources that a slim build compiled count as part of the sample. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sglang_dwdp.kernels_build import toolchain
from sglang_dwdp.kernels_build.build import default_jobs
from sglang_dwdp.kernels_build.formats import ARCHITECTURES, FORMATS
from sglang_dwdp.kernels_build.recipe import building_for, manifest_of

# What a generated source says, and the kind that it is of.
_KINDS = (
    (r"INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM\(Sm90, __nv_fp8", "grouped, FP8"),
    (r"INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM\(Sm90, float", "grouped, float32"),
    (r"INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM", "grouped, 16 bits"),
    (r"mixed_moe_(gemm|small_k)_kernelLauncher<\s*__nv_bfloat16, SafeFP4", "grouped, bf16 by FP4"),
    (r"mixed_moe_(gemm|small_k)_kernelLauncher<\s*__nv_fp8_e4m3, SafeFP4", "grouped, FP8 by FP4"),
    (r"mixed_moe_(gemm|small_k)_kernelLauncher", "grouped, FP8 by INT4"),
    (r"sm80_generic", "grouped, 16 bits, for sm80"),
    (r"", "weights only, not grouped"),
)


def kind_of(source: Path) -> str:
    """The kind of a source; hand-written ones are by themselves, but for the products of a pair of types."""
    if source.name.startswith("moe_gemm_kernels_"):
        return "product of a pair of types"
    if not source.name.endswith(".generated.cu"):
        return source.name
    text = source.read_text()
    return next(kind for pattern, kind in _KINDS if re.search(pattern, text))


def processor_s(command: list[str]) -> float:
    """Processor time of a compiler in seconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {shlex.join(command)}")
    return usage.ru_utime + usage.ru_stime


def sample(commands: Mapping[Path, list[str]], known: Mapping[str, float], each: int, jobs: int) -> dict[str, float]:
    """By source name, the processor time of `each` sources of every kind; those known are not compiled again."""
    kinds = defaultdict(list)
    for source in commands:
        kinds[kind_of(source)].append(source)
    wanted = []
    for sources in kinds.values():
        missing = each - sum(source.name in known for source in sources)
        wanted += [source for source in sources if source.name not in known][: max(0, missing)]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(jobs) as pool:

        def compile_one(source: Path) -> float:
            command = list(commands[source])
            command[command.index("-o") + 1] = str(Path(directory) / f"{source.name}.o")
            return processor_s(command)

        times = list(pool.map(compile_one, wanted))
    return {source.name: seconds for source, seconds in zip(wanted, times, strict=True)}


def main() -> None:
    """Compile the sample, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=default_jobs())
    parser.add_argument("--each", type=int, default=1, help="sources of each kind")
    args = parser.parse_args()
    import torch

    tools = toolchain.find(torch.version.cuda)
    with building_for(ARCHITECTURES[0], tools):
        from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

        entries = gen_cutlass_fused_moe_sm90_module().get_compile_commands()
        manifests = {name: manifest_of(spec.module_name(ARCHITECTURES[0])) for name, spec in FORMATS.items()}
    extra = [part for folder in tools.includes for part in ("-isystem", str(folder))]
    commands = {Path(entry["file"]): [*shlex.split(entry["command"]), *extra] for entry in entries}
    slim = {
        name: {one["source"]: one["cpu_s"] for one in found["sources"]} for name, found in manifests.items() if found
    }
    known = {source: seconds for sources in slim.values() for source, seconds in sources.items()}
    known |= sample(commands, known, args.each, args.jobs)
    by_kind = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for source in commands:
        counts[kind_of(source)] += 1
        if source.name in known:
            by_kind[kind_of(source)].append(known[source.name])
    full = sum(counts[kind] * statistics.mean(times) for kind, times in by_kind.items())
    result = {
        "nvcc": tools.cuda_version,
        "slim_processor_s": {name: round(sum(sources.values())) for name, sources in slim.items()},
        "full_processor_s_extrapolated": round(full),
        "full_sources": len(commands),
        "sampled": sum(len(times) for times in by_kind.values()),
        "kinds": {
            kind: [counts[kind], len(times), round(statistics.mean(times), 1)] for kind, times in by_kind.items()
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("module", "sources", "processor time")
    for name, sources in slim.items():
        table.add_row(name, str(len(sources)), f"{sum(sources.values()):.0f} s")
    table.add_row(f"full, from {result['sampled']} of its sources", str(len(commands)), f"{full:.0f} s (extrapolated)")
    Console().print(table)


if __name__ == "__main__":
    main()
