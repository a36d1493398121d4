"""Lets FlashInfer use slim modules, each built for one weight format, where its full one is not there.

FlashInfer 0.7.2 compiles its fused MoE for Hopper for all weight formats at once; `kernels/build.py`, in a checkout,
compiles what one format needs. FlashInfer asks one function for the module and calls the module's `init` for each
combination of dtypes, so an object that opens the slim module of the format that `init` is called for is enough.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
# What FlashInfer's `init` gets for each format: the weights' dtype, and whether they have block and group scales.
FORMATS = {
    "bf16": ("bfloat16", False, False),
    "fp8-block": ("float8_e4m3fn", True, False),
    "mxfp4": ("uint8", False, True),
}
_FUNCTION = "gen_cutlass_fused_moe_sm90_module"


def module_name(weight_format: str) -> str:
    """The name of a format's slim module, unlike any of FlashInfer's own."""
    return f"fused_moe_90_dwdp_{weight_format.replace('-', '_')}"


def built() -> dict[str, Path]:
    """The slim modules for the installed FlashInfer and PyTorch's CUDA, by format.

    `import sglang` moves FlashInfer's cache below SGLANG_CACHE_DIR, so a module may lie in this process's cache or
    in that of a process without SGLang, as a build is.
    """
    import torch
    from flashinfer.jit import env

    below = Path(env.FLASHINFER_JIT_DIR).relative_to(env.FLASHINFER_CACHE_DIR)
    found: dict[str, Path] = {}
    for weight_format in FORMATS:
        name = module_name(weight_format)
        for folder in (Path(env.FLASHINFER_JIT_DIR) / name, Path.home() / ".cache" / "flashinfer" / below / name):
            try:
                built_for = str(json.loads((folder / MANIFEST).read_text()).get("cuda", ""))
            except (OSError, ValueError):
                continue
            if (folder / f"{name}.so").exists() and _fits(weight_format, built_for, torch.version.cuda or ""):
                found.setdefault(weight_format, folder / f"{name}.so")
    return found


def _fits(weight_format: str, built_for: str, cuda: str) -> bool:
    fits = not (built_for and cuda) or built_for.split(".")[0] == cuda.split(".")[0]
    if not fits:
        logger.warning(
            "The slim FlashInfer module for %s was built for CUDA %s, and PyTorch is for CUDA %s: build it again "
            "(python kernels/build.py --format %s).",
            *(weight_format, built_for, cuda, weight_format),
        )
    return fits


def ready(weight_format: str) -> bool:
    """Whether FlashInfer can run a format without a long build: with a slim module or with its full one."""
    try:
        from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

        return weight_format in built() or bool(gen_cutlass_fused_moe_sm90_module().is_compiled)
    except Exception:  # noqa: BLE001  (no FlashInfer, or no toolkit that it could describe a build for)
        return False


def format_of(input_dtype: Any, weight_dtype: Any, block_scale: bool, group_scale: bool, humming: bool) -> str | None:
    """The format of one call of `init`; None: no slim module has it. Dtypes are torch's, or their names."""
    if str(input_dtype).removeprefix("torch.") != "bfloat16" or humming:
        return None
    call = (str(weight_dtype).removeprefix("torch."), bool(block_scale), bool(group_scale))
    return next((weight_format for weight_format, described in FORMATS.items() if described == call), None)


class SlimModule:
    """What FlashInfer's Python code uses of its module, from slim modules.

    Args:
        libraries: the slim modules, by format.
        full: builds and loads the full module, for a call that no slim one can serve.
    """

    def __init__(self, libraries: Mapping[str, Path], full: Callable[[], Any]) -> None:
        self._libraries, self._full = dict(libraries), full
        self._loaded: dict[str | None, Any] = {}
        self._include_dirs: list[str] = []

    def set_deepgemm_jit_include_dirs(self, folders: list[str]) -> None:
        """Set where kernels that are compiled at run time find their headers."""
        self._include_dirs = list(folders)
        for module in self._loaded.values():
            module.set_deepgemm_jit_include_dirs(self._include_dirs)

    def init(self, *args: Any) -> Any:
        """A runner, from the module that has it. FlashInfer passes three dtypes (input, weights, output) and flags:
        block scales, group scales, MXFP8 activations, packed weights, fused finalize, humming."""
        return self._module(format_of(args[0], args[1], args[3], args[4], args[8])).init(*args)

    def interleave_moe_weights_for_sm90_mixed_gemm(self, *args: Any) -> Any:
        """A helper that every module has."""
        return self._module(next(iter(self._libraries))).interleave_moe_weights_for_sm90_mixed_gemm(*args)

    def _module(self, weight_format: str | None) -> Any:
        key = weight_format if weight_format in self._libraries else None
        if key not in self._loaded:
            if key is None:
                logger.warning("FlashInfer builds its full fused MoE module now, which takes long.")
            self._loaded[key] = self._full() if key is None else load_library(self._libraries[key])
            self._loaded[key].set_deepgemm_jit_include_dirs(self._include_dirs)
        return self._loaded[key]


def pip_folders(cuda_version: str) -> list[Path]:
    """Where pip packages put CUDA's headers and libraries: one folder for CUDA 13, one per package before."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    names = (f"cu{cuda_version.split('.')[0]}", "cublas", "curand", "cuda_nvrtc", "cuda_runtime")
    return [root / name for root in roots for name in names if (root / name).is_dir()]


def load_library(path: Path) -> Any:
    """Open a slim module, after libraries of pip packages or a toolkit that the loader may not find by itself."""
    import torch
    import tvm_ffi

    major = (torch.version.cuda or "").split(".")[0]
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [folder / "lib" for folder in pip_folders(major)]
    folders += [Path(toolkit) / "lib64" for toolkit in toolkits if toolkit]
    for name in (f"libcudart.so.{major}", f"libnvrtc.so.{major}"):
        found = next((folder / name for folder in folders if (folder / name).exists()), None)
        if found is not None:
            ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi.load_module(str(path))


def choose(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """FlashInfer's own description of its module, unless only slim modules are there."""
    full = original(*args, **kwargs)
    libraries = built()
    if full.is_compiled or not libraries:
        return full
    logger.info("FlashInfer's fused MoE comes from slim modules: %s", ", ".join(map(str, libraries.values())))
    return SimpleNamespace(build_and_load=lambda: SlimModule(libraries, full.build_and_load))


def install() -> None:
    """Let FlashInfer in this process use slim modules. Idempotent; call it before the first fused MoE."""
    try:
        from flashinfer.fused_moe import core
    except ImportError:  # SGLang names what it misses, if the chosen backend needs it
        return
    if not isinstance(getattr(core, _FUNCTION), functools.partial):
        setattr(core, _FUNCTION, functools.partial(choose, getattr(core, _FUNCTION)))
