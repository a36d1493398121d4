"""The build on small C++ sources in place of FlashInfer's: linking without what is left out, resuming, failing."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.support.flashinfer_modules import MANIFEST
from tests.unit.kernels.script import script

CXX = shutil.which("c++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

RUNNERS = """
namespace tensorrt_llm { namespace k {
struct half {};
template <class A, class W> struct CutlassMoeFCRunner { int run(); };
}}
struct __nv_bfloat16 {};
"""
BINDING = (
    RUNNERS
    + """
#include <cstring>
#include <exception>
using namespace tensorrt_llm::k;
extern "C" int own() { return CutlassMoeFCRunner<__nv_bfloat16, __nv_bfloat16>().run(); }
extern "C" int other(char* said) {
  try { return CutlassMoeFCRunner<half, half>().run(); }
  catch (std::exception const& error) { std::strncpy(said, error.what(), 200); return -1; }
}
"""
)
OWN = (
    RUNNERS
    + """
namespace tensorrt_llm { namespace k {
template <> int CutlassMoeFCRunner<__nv_bfloat16, __nv_bfloat16>::run() { return 7; }
}}
"""
)
NEEDS_MORE = 'namespace tensorrt_llm { int helper(); } extern "C" int more() { return tensorrt_llm::helper(); }'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashInfer's cache in a folder, and a toolkit without anything, since no CUDA source is compiled."""
    from flashinfer.jit import cpp_ext, env

    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path)
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", script.ARCHITECTURE)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    for cached in (cpp_ext.get_cuda_path, cpp_ext.get_cuda_version):
        cached.cache_clear()
    yield
    for cached in (cpp_ext.get_cuda_path, cpp_ext.get_cuda_version):
        cached.cache_clear()


def spec(folder: Path, sources: dict[str, str]) -> Any:
    from flashinfer.jit.core import JitSpecNvcc

    link = folder / "link"
    link.mkdir(exist_ok=True)
    for name in ("cudart", "cuda"):
        empty = [str(CXX), "-shared", f"-Wl,-soname,lib{name}.so", "-x", "c++", "/dev/null"]
        subprocess.run([*empty, "-o", str(link / f"lib{name}.so")], check=True)
    paths = []
    for name, text in sources.items():
        paths.append(script._written(folder / f"{name}.cpp", text))
    return JitSpecNvcc("small", paths, [], [], [f"-L{link}", "-Wl,--as-needed"], None)


def build(plan: Any) -> Path:
    script.build(plan, "bf16", 2, {"format": "bf16"})
    library: Path = plan.jit_library_path
    return library


def objects(folder: Path) -> dict[str, int]:
    return {path.name.split("_")[-1]: path.stat().st_mtime_ns for path in (folder / "small").glob("*.o")}


def test_the_module_has_its_own_runner_and_an_error_for_the_others(tmp_path: Path) -> None:
    library = build(spec(tmp_path, {"binding": BINDING, "own": OWN}))
    assert script.missing_symbols(library) == []
    assert json.loads((library.parent / MANIFEST).read_text()) == {"format": "bf16"}
    for name in ("cudart", "cuda"):
        ctypes.CDLL(str(tmp_path / "link" / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
    module = ctypes.CDLL(str(library))
    assert module.own() == 7
    said = ctypes.create_string_buffer(201)
    assert module.other(said) == -1
    assert b"built by kernels/build.py for bf16 weights only" in said.value


def test_a_second_build_compiles_only_what_changed(tmp_path: Path) -> None:
    build(spec(tmp_path, {"binding": BINDING, "own": OWN}))
    before = objects(tmp_path)
    build(spec(tmp_path, {"binding": BINDING, "own": OWN.replace("7", "8")}))
    changed = {name for name, time in objects(tmp_path).items() if time != before[name]}
    assert changed == {"own.o"}


def test_a_source_that_does_not_compile(tmp_path: Path) -> None:
    with pytest.raises(DwdpError, match="small was not built"):
        build(spec(tmp_path, {"binding": BINDING, "own": "int broken("}))
    assert not (tmp_path / "small" / MANIFEST).exists()
    build(spec(tmp_path, {"binding": BINDING, "own": OWN}))
    assert (tmp_path / "small" / MANIFEST).exists()


def test_something_that_all_formats_need_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DwdpError, match=r"needs more for bf16 than is known here: tensorrt_llm::helper\(\) and 0 more"):
        build(spec(tmp_path, {"binding": BINDING, "own": OWN, "more": NEEDS_MORE}))
    assert not (tmp_path / "small" / MANIFEST).exists()


def test_one_build_at_a_time(tmp_path: Path) -> None:
    from filelock import FileLock

    plan = spec(tmp_path, {"binding": BINDING, "own": OWN})
    plan.build_dir.mkdir()
    with FileLock(plan.build_dir / "lock"), pytest.raises(DwdpError, match="another process is building small"):
        build(plan)
