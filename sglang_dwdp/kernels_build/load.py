"""Letting FlashInfer use slim modules where its full one is neither installed nor built.

FlashInfer asks one function for its fused MoE module for Hopper, and of the module that it gets it calls `init` for
each combination of dtypes. So a stand-in for the module is enough that opens the slim module of the format that
`init` is called for.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sglang_dwdp.kernels_build.formats import ARCHITECTURES, FORMATS
from sglang_dwdp.kernels_build.recipe import library_of, manifest_of
from sglang_dwdp.kernels_build.toolchain import pip_folders

logger = logging.getLogger(__name__)
_FUNCTION = "gen_cutlass_fused_moe_sm90_module"


def built(architecture: str = ARCHITECTURES[0]) -> dict[str, Path]:
    """The slim modules that are there for the installed FlashInfer and PyTorch's CUDA, by format."""
    found = {}
    for name, spec in FORMATS.items():
        library = library_of(spec.module_name(architecture))
        if library is not None and _fits(name, manifest_of(spec.module_name(architecture)) or {}):
            found[name] = library
    return found


def _fits(name: str, manifest: Mapping[str, Any]) -> bool:
    import torch

    mine, built_for = ((text or "").split(".")[0] for text in (torch.version.cuda, manifest.get("cuda")))
    if mine and built_for and mine != built_for:
        logger.warning(
            "The slim FlashInfer module for %s was built for CUDA %s, and PyTorch is for CUDA %s: run "
            "`sglang-dwdp build-kernels --format %s` again.",
            name,
            built_for,
            mine,
            name,
        )
        return False
    return True


def ready(name: str, architecture: str = ARCHITECTURES[0]) -> bool:
    """Whether FlashInfer can run a format at once: with a slim module, or with its full one."""
    if name in built(architecture):
        return True
    try:
        from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

        return bool(gen_cutlass_fused_moe_sm90_module().is_compiled)
    except Exception:  # noqa: BLE001  (no FlashInfer, or no toolchain that it could describe a build for)
        return False


def format_of(
    input_dtype: Any, weight_dtype: Any, *, block_scale: bool, group_scaling: bool, humming: bool
) -> str | None:
    """The format of one call of `init`, by torch dtypes (or their names) and flags; None: no slim one has it."""
    weights = str(weight_dtype).removeprefix("torch.")
    if str(input_dtype).removeprefix("torch.") != "bfloat16" or humming:
        return None
    flags = {"bf16": not block_scale and not group_scaling, "fp8-block": block_scale, "mxfp4": group_scaling}
    return next((name for name, spec in FORMATS.items() if weights in spec.weight_dtypes and flags[name]), None)


class SlimModule:
    """In place of FlashInfer's module: what its Python code uses of it, from the slim modules.

    full: builds and loads the full module, for a call that no slim one can serve.
    """

    def __init__(self, libraries: Mapping[str, Path], full: Callable[[], Any], load: Callable[[Path], Any]) -> None:
        self._libraries, self._full, self._load = dict(libraries), full, load
        self._loaded: dict[str | None, Any] = {}
        self._include_dirs: list[str] = []

    def set_deepgemm_jit_include_dirs(self, folders: list[str]) -> None:
        """Where kernels that are compiled at run time find their headers."""
        self._include_dirs = list(folders)
        for module in self._loaded.values():
            module.set_deepgemm_jit_include_dirs(self._include_dirs)

    def init(
        self,
        input_dtype: Any,
        weight_dtype: Any,
        output_dtype: Any,
        use_deepseek_fp8_block_scale: bool,
        use_w4_group_scaling: bool,
        use_mxfp8_act_scaling: bool,
        use_packed_weights: bool,
        use_fused_finalize: bool,
        use_wfp4afp8_humming: bool,
    ) -> Any:
        """A runner for these dtypes, from the module that has it."""
        name = format_of(
            input_dtype,
            weight_dtype,
            block_scale=use_deepseek_fp8_block_scale,
            group_scaling=use_w4_group_scaling,
            humming=use_wfp4afp8_humming,
        )
        return self._module(name).init(
            input_dtype,
            weight_dtype,
            output_dtype,
            use_deepseek_fp8_block_scale,
            use_w4_group_scaling,
            use_mxfp8_act_scaling,
            use_packed_weights,
            use_fused_finalize,
            use_wfp4afp8_humming,
        )

    def interleave_moe_weights_for_sm90_mixed_gemm(self, *args: Any) -> Any:
        """A helper that all modules have."""
        return self._module(next(iter(self._libraries))).interleave_moe_weights_for_sm90_mixed_gemm(*args)

    def _module(self, name: str | None) -> Any:
        key = name if name in self._libraries else None
        if key not in self._loaded:
            if key is None:
                hint = f"`sglang-dwdp build-kernels --format {name}` builds what it needs in less time" if name else ""
                logger.warning("FlashInfer builds its full fused MoE module now, which takes long. %s", hint)
                self._loaded[key] = self._full()
            else:
                self._loaded[key] = self._load(self._libraries[key])
            self._loaded[key].set_deepgemm_jit_include_dirs(self._include_dirs)
        return self._loaded[key]


class _SlimSpec:
    """In place of FlashInfer's description of its module."""

    def __init__(self, libraries: Mapping[str, Path], full: Any) -> None:
        self._libraries, self._full = libraries, full

    def build_and_load(self) -> SlimModule:
        return SlimModule(self._libraries, self._full.build_and_load, load_library)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._full, name)


def load_library(path: Path) -> Any:
    """Open a module, with the libraries that it needs and that the system's search may not find: those of pip packages,
    or of a toolkit."""
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
    """In place of FlashInfer's function: its own description, unless only slim modules are there."""
    full = original(*args, **kwargs)
    libraries = built()
    if full.is_compiled or not libraries:
        return full
    logger.info("FlashInfer's fused MoE comes from slim modules: %s", ", ".join(map(str, libraries.values())))
    return _SlimSpec(libraries, full)


def install() -> None:
    """Let FlashInfer in this process use slim modules. Idempotent; before its first fused MoE call."""
    try:
        from flashinfer.fused_moe import core
    except ImportError:  # SGLang names what it misses, if the chosen backend needs it
        return
    if not isinstance(getattr(core, _FUNCTION), functools.partial):
        setattr(core, _FUNCTION, functools.partial(choose, getattr(core, _FUNCTION)))
