"""The commands that build a slim module, taken from FlashInfer's own description of its full one."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.kernels_build.formats import KernelFormat, instantiation
from sglang_dwdp.kernels_build.toolchain import Toolchain

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Step:
    """One source, the object that it becomes, and the command that does it."""

    source: Path
    target: Path
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that `build` needs.

    steps: the longest ones first, as far as file names tell.
    full_sources: how many sources FlashInfer compiles for all formats.
    """

    spec: KernelFormat
    name: str
    directory: Path
    flashinfer: str
    steps: tuple[Step, ...]
    full_sources: int

    @property
    def library(self) -> Path:
        """The module."""
        return self.directory / f"{self.name}.so"


def directory_of(name: str) -> Path:
    """The folder of a module in FlashInfer's cache, beside FlashInfer's own modules."""
    from flashinfer.jit import env

    return Path(env.FLASHINFER_JIT_DIR) / name


def library_of(name: str) -> Path | None:
    """The module of this name for the installed FlashInfer; None: it was not built, or not to its end.

    `import sglang` moves FlashInfer's cache below SGLANG_CACHE_DIR, where it is imported first. So a module may lie in
    the cache that this process has, or in the one of a process that did not import SGLang, as a build is.
    """
    from flashinfer.jit import env

    below = Path(env.FLASHINFER_JIT_DIR).relative_to(env.FLASHINFER_CACHE_DIR)
    for folder in (directory_of(name), Path.home() / ".cache" / "flashinfer" / below / name):
        if _read_manifest(folder) is not None and (folder / f"{name}.so").exists():
            return folder / f"{name}.so"
    return None


def manifest_of(name: str) -> dict[str, Any] | None:
    """What was built under this name for the installed FlashInfer; None: nothing, or not to its end."""
    library = library_of(name)
    return None if library is None else _read_manifest(library.parent)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return content


@contextlib.contextmanager
def building_for(architecture: str, tools: Toolchain) -> Iterator[None]:
    """The environment in which FlashInfer describes a build for `architecture`, also where there is no GPU.

    FlashInfer reads it when it is first imported, so nothing may have imported it before.
    """
    wanted = {"FLASHINFER_CUDA_ARCH_LIST": architecture, "CUDA_HOME": str(tools.cuda_home), "CXX": tools.cxx}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def recipe(spec: KernelFormat, architecture: str, tools: Toolchain) -> Recipe:
    """The recipe for a format; to be called within `building_for`.

    Raises:
        DwdpError: the installed FlashInfer describes its module in another way than this was written for.
    """
    try:
        import flashinfer
        from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module
    except ImportError as error:
        raise DwdpError(f"FlashInfer cannot be imported ({error}). Install sglang with its dependencies.") from error
    full = gen_cutlass_fused_moe_sm90_module()
    commands = {Path(entry["file"]): shlex.split(entry["command"]) for entry in full.get_compile_commands()}
    name = spec.module_name(architecture)
    directory = directory_of(name)
    original = next((path for path in commands if path.name == "cutlass_fused_moe_instantiation.cu"), None)
    chosen = [path for path in commands if spec.needs(path)]
    if original is None or not chosen:
        raise DwdpError(f"FlashInfer {flashinfer.__version__} describes its fused MoE in a way that is not known here.")
    own = directory / "instantiation.cu"
    directory.mkdir(parents=True, exist_ok=True)
    _write(own, instantiation(_template("slim_instantiation.cu.in"), spec))
    extra = [f"-I{original.parent}", *(part for folder in tools.includes for part in ("-isystem", str(folder)))]
    steps = [_step(own, directory, commands[original], original, extra)]
    steps += [_step(path, directory, commands[path], path, extra) for path in chosen]
    steps.sort(key=lambda step: not step.source.name.startswith(("instantiation", "moe_gemm_kernels", "flashinfer")))
    return Recipe(spec, name, directory, str(flashinfer.__version__), tuple(steps), len(commands))


def stand_ins_template() -> str:
    """The text of `kernels/missing_kernels.cpp.in`."""
    return _template("missing_kernels.cpp.in")


def _template(name: str) -> str:
    return (files("sglang_dwdp") / "kernels" / name).read_text()


def _step(source: Path, directory: Path, command: list[str], original: Path, extra: list[str]) -> Step:
    target = directory / f"{source.parent.name}_{source.stem}.o"
    output = command.index("-o") + 1
    replaced = [str(source) if part == str(original) else part for part in command]
    replaced[output] = str(target)
    return Step(source, target, (*replaced, *extra))


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
