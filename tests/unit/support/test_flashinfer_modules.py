"""Which module serves which call; and, where slim modules were built, that they open without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.support import flashinfer_modules

BF16, FP8, U8 = torch.bfloat16, torch.float8_e4m3fn, torch.uint8
FLAGS = ("block_scale", "group_scale", "humming")


@pytest.mark.parametrize(
    ("dtypes", "flags", "name"),
    [
        ((BF16, BF16), (), "bf16"),
        ((BF16, FP8), ("block_scale",), "fp8-block"),
        ((BF16, U8), ("group_scale",), "mxfp4"),
        ((FP8, FP8), (), None),
        ((torch.float16, torch.float16), (), None),
        ((BF16, U8), ("group_scale", "humming"), None),
    ],
)
def test_the_format_of_a_call(
    dtypes: tuple[torch.dtype, torch.dtype], flags: tuple[str, ...], name: str | None
) -> None:
    assert flashinfer_modules.format_of(*dtypes, **{flag: flag in flags for flag in FLAGS}) == name


class Module:
    """A loaded module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folders: list[str] = []

    def set_deepgemm_jit_include_dirs(self, folders: list[str]) -> None:
        self.folders = folders

    def init(self, *args: Any) -> tuple[str, Any]:
        return self.name, args


def test_each_call_opens_the_module_of_its_format_and_the_full_one_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    def loaded(path: Path) -> Module:
        opened.append(path.name)
        return Module(path.name)

    monkeypatch.setattr(flashinfer_modules, "load_library", loaded)
    slim = flashinfer_modules.SlimModule({"bf16": Path("b.so"), "mxfp4": Path("m.so")}, lambda: Module("full"))
    slim.set_deepgemm_jit_include_dirs(["here"])
    none = (False,) * 6
    assert slim.init(BF16, BF16, BF16, *none)[0] == "b.so"
    assert slim.init(BF16, BF16, BF16, *none)[0] == "b.so"
    assert slim.init(BF16, U8, BF16, False, True, False, False, False, False)[0] == "m.so"
    assert opened == ["b.so", "m.so"]
    assert slim.init(BF16, FP8, BF16, True, False, False, False, False, False)[0] == "full"
    assert slim.init(torch.float16, torch.float16, torch.float16, *none)[0] == "full"
    assert {module.name for module in slim._loaded.values()} == {"b.so", "m.so", "full"}
    assert all(module.folders == ["here"] for module in slim._loaded.values())


def test_slim_modules_are_used_only_where_the_full_one_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(is_compiled=True, build_and_load=lambda: Module("full"))
    monkeypatch.setattr(flashinfer_modules, "built", lambda: {"bf16": Path("b.so")})
    assert flashinfer_modules.choose(lambda: full) is full
    full.is_compiled = False
    assert isinstance(flashinfer_modules.choose(lambda: full).build_and_load(), flashinfer_modules.SlimModule)
    monkeypatch.setattr(flashinfer_modules, "built", dict)
    assert flashinfer_modules.choose(lambda: full) is full


WHERE = """
import sys
from pathlib import Path
if sys.argv[1] == "sglang":
    import sglang
from sglang_dwdp.support.flashinfer_modules import built
print(built())
Path(sys.argv[2]).touch()
print(*built().values())
"""


@pytest.mark.parametrize(
    ("built_for", "pytorch", "fits"), [("13.0", "13.2", True), ("12.9", "13.0", False), ("13.0", None, True)]
)
def test_a_module_for_another_cuda_is_left_alone(
    built_for: str,
    pytorch: str | None,
    fits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flashinfer.jit import env

    monkeypatch.setattr(env, "FLASHINFER_CACHE_DIR", tmp_path)
    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path / "ops")
    monkeypatch.setenv("HOME", str(tmp_path))
    name = flashinfer_modules.module_name("bf16")
    (tmp_path / "ops" / name).mkdir(parents=True)
    (tmp_path / "ops" / name / f"{name}.so").touch()
    (tmp_path / "ops" / name / "manifest.json").write_text(json.dumps({"cuda": built_for}))
    monkeypatch.setattr(torch.version, "cuda", pytorch)
    assert list(flashinfer_modules.built()) == (["bf16"] if fits else [])
    assert ("build it again" in caplog.text) is not fits


@pytest.mark.parametrize("first", ["sglang", "flashinfer"])
def test_a_built_module_is_found_where_sglang_has_moved_flashinfers_cache(first: str, tmp_path: Path) -> None:
    """`import sglang` sets FLASHINFER_WORKSPACE_BASE; a build does not import SGLang, and a server does."""
    from flashinfer import __version__

    name = flashinfer_modules.module_name("bf16")
    folder = tmp_path / ".cache" / "flashinfer" / __version__ / "90a" / "cached_ops" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    dropped = ("FLASHINFER_WORKSPACE_BASE", "SGLANG_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"HOME": str(tmp_path), "FLASHINFER_CUDA_ARCH_LIST": "9.0a"}
    library = folder / f"{name}.so"
    command = [sys.executable, "-c", WHERE, first, str(library)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    assert said.stdout.splitlines()[-2:] == ["{}", str(library)]  # the first before it was built to its end


OPEN = """
import sys, torch
from pathlib import Path
from sglang_dwdp.support.flashinfer_modules import load_library
module = load_library(Path(sys.argv[1]))
print(hasattr(module, "init"), hasattr(module, "interleave_moe_weights_for_sm90_mixed_gemm"))
try:
    module.init(torch.float16, torch.float16, torch.float16, False, False, False, False, False, False)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("name", flashinfer_modules.FORMATS)
def test_a_built_module_opens_and_names_itself_where_a_format_is_missing(name: str, tmp_path: Path) -> None:
    library = flashinfer_modules.built().get(name)
    if library is None:
        pytest.skip(f"needs kernels/build.py --format {name}; without a GPU, FLASHINFER_CUDA_ARCH_LIST=9.0a")
    said = subprocess.run(["nm", "-D", "-u", str(library)], capture_output=True, text=True, check=True).stdout
    needed = [line.split()[-1] for line in said.splitlines()]
    assert not any("tensorrt_llm" in symbol for symbol in needed)
    # In place of the driver's library, for machines without one: its functions, which are not called here.
    driver = [symbol for symbol in needed if symbol.startswith("cu") and "@" not in symbol]
    (tmp_path / "driver.c").write_text("\n".join(f"int {symbol}(void) {{ return 100; }}" for symbol in driver))
    stub = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(tmp_path / "driver.c"), "-o", str(stub)])
    if not torch.cuda.is_available():
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    else:
        environment = dict(os.environ)
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, str(library)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert opened.stdout.startswith("True True"), opened.stderr
    assert f"for {name} weights only" in opened.stdout
