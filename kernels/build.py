"""Builds what one weight format needs of FlashInfer's fused MoE for Hopper, into FlashInfer's cache.

    python kernels/build.py --format mxfp4

FlashInfer 0.7.2 compiles its module for all formats at once, 248 sources. This compiles the sources of one format,
unchanged, with FlashInfer's own flags and build files, and adds two: one that instantiates the runner of the format,
and one that turns calls of the other formats' runners into errors. A server with DWDP uses the module where
FlashInfer's full one is not installed or built. It needs nvcc and a C++ compiler, but no GPU; an interrupted build
goes on where it was. docs/troubleshooting.md has times and sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.support.flashinfer_modules import MANIFEST, module_name, pip_folders

ARCHITECTURE = "9.0a"
_MEMORY_OF_A_COMPILER = 8 << 30  # bytes; the largest source of FlashInfer 0.7.2 takes 7.1 GiB
_HEADERS = ("cublasLt.h", "curand_kernel.h", "nvrtc.h")
_FLASHINFER = "12tensorrt_llm"  # in the mangled name of everything that FlashInfer's module itself defines

INSTANTIATION = """#include "cutlass_fused_moe_kernels.cuh"
#include "moe_kernels.h"

namespace tensorrt_llm::kernels::cutlass_kernels {{
template class CutlassMoeFCRunner<{runner}>;
}}  // namespace tensorrt_llm::kernels::cutlass_kernels
"""
# The binding passes C++ exceptions on to Python.
MISSING = """#include <stdexcept>

extern "C" __attribute__((visibility("hidden"))) void sglang_dwdp_missing_kernel() {{
  throw std::runtime_error(
      "this module was built by kernels/build.py for {weight_format} weights only. Build the format that this model "
      "needs, or install FlashInfer's prebuilt kernels (flashinfer-jit-cache).");
}}

{aliases}
"""

# What a slim module may lack: the runners and launchers of other formats. Anything else is shared by all formats, and
# leaving it out would be a mistake of FORMATS.
_REPLACEABLE = re.compile(
    r"(CutlassMoeFCRunner|MoeGemmRunner|CutlassFp8BlockScaleGemmRunner"
    r"|sm80_generic_fused_moe_gemm_kernelLauncher|sm90_generic_mixed_moe_(gemm|small_k)_kernelLauncher"
    r"|tma_warp_specialized_generic_moe_gemm_kernelLauncher\w*)<"
)


@dataclasses.dataclass(frozen=True, slots=True)
class KernelFormat:
    """What a weight format needs of FlashInfer's sources.

    Attributes:
        runner: the template arguments of its `CutlassMoeFCRunner`.
        gemm: the hand-written source of its matrix products, by activation and weight type.
        generated: matches the text of a generated source that it needs; None: it needs none.
        block_scale: whether it needs the block-scaled FP8 product, which compiles kernels at run time.
    """

    runner: str
    gemm: str
    generated: re.Pattern[str] | None = None
    block_scale: bool = False

    def needs(self, source: Path) -> bool:
        """Whether a source of FlashInfer's full module is compiled, as it is, for this format."""
        if source.name.endswith(".generated.cu"):
            return self.generated is not None and self.generated.search(source.read_text()) is not None
        if source.name.startswith("moe_gemm_kernels_"):
            return source.name == f"moe_gemm_kernels_{self.gemm}.cu"
        if source.name == "fp8_blockscale_gemm.cu":
            return self.block_scale
        return source.name != "cutlass_fused_moe_instantiation.cu"

    def unexpected(self, missing: Iterable[str]) -> list[str]:
        """The missing symbols (demangled) that are not another format's."""
        runner = re.escape(self.runner.replace("Fp4Type", "cutlass::float_e2m1_t"))
        own = re.compile(rf"(CutlassMoeFCRunner|MoeGemmRunner)<{runner}[,>]")
        return [symbol for symbol in missing if not _REPLACEABLE.search(symbol) or own.search(symbol)]


FORMATS = {
    "bf16": KernelFormat(
        "__nv_bfloat16, __nv_bfloat16",
        "bf16_bf16",
        re.compile(
            r"INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM\(Sm90, __nv_bfloat16, __nv_bfloat16,"
            r"|sm80_generic_fused_moe_gemm_kernelLauncher<cutlass::bfloat16_t,"
        ),
    ),
    "fp8-block": KernelFormat("__nv_bfloat16, __nv_fp8_e4m3", "bf16_fp8", block_scale=True),
    "mxfp4": KernelFormat(
        "__nv_bfloat16, Fp4Type",
        "bf16_fp4",
        re.compile(r"sm90_generic_mixed_moe_gemm_kernelLauncher<\s*__nv_bfloat16, SafeFP4,"),
    ),
}


def find_toolkit(torch_cuda: str) -> tuple[Path, str, list[Path]]:
    """The CUDA toolkit, its version, and the folders of pip packages that complete it.

    Args:
        torch_cuda: the CUDA version that PyTorch was built with.

    Raises:
        DwdpError: something is missing or has another CUDA major version than PyTorch; the message says what to do.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    places = [Path(named or "/usr/local/cuda")]
    if not named and on_path:
        places.append(Path(on_path).resolve().parent.parent)
    home = next((place for place in places if (place / "bin" / "nvcc").exists()), None)
    if home is None:
        raise DwdpError(
            f"there is no bin/nvcc in {' or '.join(map(str, places))}. Install the CUDA toolkit, and set CUDA_HOME "
            "if it is not on the PATH."
        )
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+\.\d+)", said)
    if match is None or match[1].split(".")[0] != torch_cuda.split(".")[0]:
        found = match[1] if match else "of an unknown release"
        raise DwdpError(
            f"nvcc {found} in {home} cannot build for this PyTorch, which is for CUDA {torch_cuda}. "
            "Set CUDA_HOME to a toolkit of the same major version."
        )
    pip = pip_folders(match[1])
    searched = [folder / "include" for folder in (home, *pip)]
    for header in _HEADERS:
        if not any((folder / header).exists() for folder in searched):
            raise DwdpError(
                f"{header} was not found in {', '.join(map(str, searched))}. Install the full CUDA toolkit, or the pip "
                "packages nvidia-cublas, nvidia-curand and nvidia-cuda-nvrtc that fit this PyTorch."
            )
    return home, match[1], pip


def slim_spec(full: Any, weight_format: str, home: Path, pip: Sequence[Path], cuda_version: str) -> Any:
    """FlashInfer's description of the full module, cut down to one format.

    Args:
        full: FlashInfer's `JitSpecNvcc` of the full module.
        weight_format: a key of FORMATS.
        home: the CUDA toolkit.
        pip: folders of pip packages, searched after the toolkit.
        cuda_version: of the toolkit.

    Raises:
        DwdpError: FlashInfer describes its module in another way than this was written for.
    """
    kernels = FORMATS[weight_format]
    sources = [Path(source) for source in full.sources]
    original = next((source for source in sources if source.name == "cutlass_fused_moe_instantiation.cu"), None)
    if original is None or not any(kernels.needs(source) for source in sources):
        raise DwdpError("the installed FlashInfer has other sources for its fused MoE than are known here.")
    slim = dataclasses.replace(full, name=module_name(weight_format))
    own = _written(slim.build_dir / "instantiation.cu", INSTANTIATION.format(runner=kernels.runner))
    system = [part for folder in pip for part in ("-isystem", str(folder / "include"))]
    libraries = _link_folder(slim.build_dir / "link", home, pip, cuda_version.split(".")[0])
    chosen = sorted(filter(kernels.needs, sources), key=lambda source: "moe_gemm_kernels" not in source.name)
    return dataclasses.replace(
        slim,
        sources=[own, *chosen],
        extra_cflags=[*full.extra_cflags, *system],
        extra_cuda_cflags=[*full.extra_cuda_cflags, *system],
        extra_include_dirs=[*full.extra_include_dirs, original.parent],
        extra_ldflags=["-Wl,--no-as-needed", f"-L{libraries}", "-lcudart", "-lcuda", "-lnvrtc"],
    )


def _link_folder(folder: Path, home: Path, pip: Sequence[Path], major: str) -> Path:
    """A folder with the libraries to link with under the names that the linker looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    searched = [home / "lib64", *(one / "lib" for one in pip)]
    for name in ("libcudart.so", "libnvrtc.so"):
        found = next((path for path in (one / f"{name}.{major}" for one in searched) if path.exists()), None)
        if found is None:
            raise DwdpError(
                f"{name}.{major} was not found in {', '.join(map(str, searched))}. Install the full toolkit."
            )
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(found)
    # libcuda comes with the driver, so a machine that only builds has none: an empty library of that name is enough
    # to make the module ask for the real one when it is loaded.
    driver = [os.environ.get("CXX", "c++"), "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c++", os.devnull]
    subprocess.run([*driver, "-o", folder / "libcuda.so"], check=True)
    return folder


def missing_symbols(library: Path) -> list[str]:
    """Mangled names of FlashInfer's own symbols that a library refers to and does not define."""
    said = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    return sorted(name for line in said.splitlines() if _FLASHINFER in (name := line.split()[-1]))


def write_missing(path: Path, weight_format: str, symbols: Sequence[str]) -> Path:
    """Write the source that defines the symbols that a slim module may lack, as functions that throw.

    Raises:
        DwdpError: one of them is needed by the format itself.
    """
    said = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    unexpected = FORMATS[weight_format].unexpected(said.splitlines())
    if unexpected:
        raise DwdpError(
            f"the installed FlashInfer needs more for {weight_format} than is known here: {unexpected[0]} and "
            f"{len(unexpected) - 1} more. Use its full module instead."
        )
    target = '__attribute__((alias("sglang_dwdp_missing_kernel")))'
    aliases = "\n".join(f'void missing_{i}() __asm__("{symbol}") {target};' for i, symbol in enumerate(symbols))
    return _written(path, MISSING.format(weight_format=weight_format, aliases=aliases))


def build(spec: Any, weight_format: str, jobs: int, manifest: dict[str, Any]) -> None:
    """Compile and link; add what a first link shows to be missing, and link again.

    Args:
        spec: FlashInfer's `JitSpecNvcc`, cut down to the format.
        weight_format: a key of FORMATS.
        jobs: compilers at a time.
        manifest: written beside the library when it is complete.

    Raises:
        DwdpError: another build of this module runs, a compiler failed, or the module lacks what it needs.
    """
    done = spec.build_dir / MANIFEST
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(spec.build_dir / "lock", timeout=0))
        except Timeout:
            raise DwdpError(f"another process is building {spec.name}; wait for it to end.") from None
        done.unlink(missing_ok=True)
        _ninja(spec, jobs)
        if symbols := missing_symbols(spec.jit_library_path):
            extra = write_missing(spec.build_dir / "missing_kernels.cpp", weight_format, symbols)
            spec = dataclasses.replace(spec, sources=[*spec.sources, extra])
            _ninja(spec, jobs)
        if left := missing_symbols(spec.jit_library_path):
            raise DwdpError(f"{spec.name} was linked without {left[0]} and {len(left) - 1} more.")
        done.write_text(json.dumps(manifest, indent=1) + "\n")


def _ninja(spec: Any, jobs: int) -> None:
    spec.write_ninja()
    done = subprocess.run(["ninja", "-C", spec.build_dir, "-f", spec.ninja_path, "-j", str(jobs)], check=False)
    if done.returncode:
        raise DwdpError(f"{spec.name} was not built: ninja ended with exit code {done.returncode}, see above.")


def _written(path: Path, text: str) -> Path:
    """Write a file if its text changes: ninja compiles by modification time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def default_jobs() -> int:
    """As many compilers as there are processors and memory for."""
    available: int = psutil.virtual_memory().available
    return max(1, min(len(os.sched_getaffinity(0)), available // _MEMORY_OF_A_COMPILER))


def main(argv: Sequence[str] | None = None) -> int:
    """Build one format; exit code 1 and one line on stderr for what a user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="of the expert weights")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="compilers at a time (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the sources and the library, and build nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    import torch

    start = time.monotonic()
    try:
        home, cuda_version, pip = find_toolkit(torch.version.cuda or "")
        # FlashInfer reads these when it is imported.
        os.environ.update(FLASHINFER_CUDA_ARCH_LIST=ARCHITECTURE, CUDA_HOME=str(home))
        import flashinfer
        from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

        full = gen_cutlass_fused_moe_sm90_module()
        spec = slim_spec(full, args.format, home, pip, cuda_version)
        if args.list:
            print(*spec.sources, spec.jit_library_path, sep="\n")
            return 0
        manifest = {"format": args.format, "flashinfer": flashinfer.__version__, "cuda": cuda_version}
        build(spec, args.format, args.jobs, manifest)
    except (DwdpError, OSError) as error:
        sys.stderr.write(f"kernels/build.py: error: {error}\n")
        return 1
    size = spec.jit_library_path.stat().st_size / (1 << 20)
    print(f"built {spec.jit_library_path} ({size:.1f} MiB) in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
