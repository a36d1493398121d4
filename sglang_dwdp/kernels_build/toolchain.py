"""Finding the compilers, and the headers and libraries that may come with a toolkit or with pip packages."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sglang_dwdp.errors import DwdpError


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiles and links.

    cuda_home: the toolkit.  cuda_version: such as "13.0".  cxx: the C++ compiler.
    includes: folders searched after the toolkit's, for headers that a bare compiler package lacks.
    libraries: the CUDA runtime and NVRTC, as files.
    """

    cuda_home: Path
    cuda_version: str
    cxx: str
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]


def find(torch_cuda: str | None) -> Toolchain:
    """The toolchain of this machine; `torch_cuda` is the CUDA version that PyTorch was built with.

    Raises:
        DwdpError: something is missing, or has another CUDA major version than PyTorch; the message says what to do.
    """
    home = _cuda_home()
    text = _run([str(home / "bin" / "nvcc"), "--version"])
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise DwdpError(f"{home}/bin/nvcc does not say its release: {text.strip()[:200]}")
    version = match[1]
    if torch_cuda is not None and version.split(".")[0] != torch_cuda.split(".")[0]:
        raise DwdpError(
            f"nvcc {version} in {home} cannot build for this PyTorch, which is for CUDA {torch_cuda}: the major "
            "versions differ. Set CUDA_HOME to a toolkit that fits."
        )
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if cxx is None:
        raise DwdpError("no C++ compiler was found. Install g++, or set CXX.")
    pip = pip_folders(version)
    includes = tuple(folder / "include" for folder in pip if (folder / "include").is_dir())
    searched = [home / "include", *includes]
    for header in ("cublasLt.h", "curand_kernel.h", "nvrtc.h"):
        if not any((folder / header).exists() for folder in searched):
            raise DwdpError(
                f"{header} was not found in {', '.join(map(str, searched))}. Install the full CUDA toolkit, or the pip "
                "packages nvidia-cublas, nvidia-curand and nvidia-cuda-nvrtc that fit this PyTorch."
            )
    folders = [home / "lib64", home / "targets" / "x86_64-linux" / "lib", *(folder / "lib" for folder in pip)]
    major = version.split(".")[0]
    libraries = tuple(_library(name, folders) for name in (f"libcudart.so.{major}", f"libnvrtc.so.{major}"))
    return Toolchain(home, version, cxx, includes, libraries)


def pip_folders(cuda_version: str) -> list[Path]:
    """Where pip packages put CUDA's headers and libraries: one folder for CUDA 13, one for each package before."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    names = (f"cu{cuda_version.split('.')[0]}", "cublas", "curand", "cuda_nvrtc", "cuda_runtime")
    return [root / name for root in roots for name in names if (root / name).is_dir()]


def _cuda_home() -> Path:
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if given:
        if not (Path(given) / "bin" / "nvcc").exists():
            raise DwdpError(f"CUDA_HOME is {given}, which has no bin/nvcc. Correct it, or unset it.")
        return Path(given)
    nvcc = shutil.which("nvcc") or next(
        (str(path) for path in (Path("/usr/local/cuda/bin/nvcc"),) if path.exists()), None
    )
    if nvcc is None:
        raise DwdpError(
            "nvcc was not found. Install the CUDA toolkit (no GPU is needed to build), and set CUDA_HOME if it is not "
            "on the PATH."
        )
    # The nvcc on the PATH may be a script elsewhere, so it is asked where its toolkit is.
    match = re.search(r"#\$ TOP=(.+)", _run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]))
    return Path(match[1].strip()).resolve() if match else Path(nvcc).resolve().parent.parent


def _library(name: str, folders: list[Path]) -> Path:
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise DwdpError(f"{name} was not found in {', '.join(map(str, folders))}. Install the full CUDA toolkit.")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
