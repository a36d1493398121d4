"""The build on small C++ sources in place of FlashInfer's: linking without what is left out, resuming, failing."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path

import pytest

from sglang_dwdp.errors import DwdpError
from sglang_dwdp.kernels_build import symbols
from sglang_dwdp.kernels_build.build import Build, Compiled
from sglang_dwdp.kernels_build.formats import FORMATS
from sglang_dwdp.kernels_build.recipe import MANIFEST, Recipe, Step
from sglang_dwdp.kernels_build.toolchain import Toolchain

CXX = shutil.which("c++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

RUNNERS = """
namespace tensorrt_llm { namespace k {
struct bf16 {}; struct half {};
template <class A, class W> struct CutlassMoeFCRunner { int run(); };
}}
"""
BINDING = (
    RUNNERS
    + """
#include <cstring>
#include <exception>
using namespace tensorrt_llm::k;
extern "C" int own() { return CutlassMoeFCRunner<bf16, bf16>().run(); }
extern "C" int other(char* said) {
  try { return CutlassMoeFCRunner<half, half>().run(); }
  catch (std::exception const& error) { std::strncpy(said, error.what(), 200); return -1; }
}
"""
)
OWN = (
    RUNNERS
    + """
namespace tensorrt_llm { namespace k { template <> int CutlassMoeFCRunner<bf16, bf16>::run() { return 7; } }}
"""
)

NEEDS_MORE = 'namespace tensorrt_llm { int helper(); } extern "C" int more() { return tensorrt_llm::helper(); }'


def recipe(folder: Path, sources: dict[str, str]) -> Recipe:
    steps = []
    for name, text in sources.items():
        source = folder / f"{name}.cpp"
        source.write_text(text)
        target = folder / f"{name}.o"
        steps.append(Step(source, target, (str(CXX), "-fPIC", "-c", str(source), "-o", str(target))))
    return Recipe(FORMATS["bf16"], "small", folder, "1.0", tuple(steps), 9)


def build(plan: Recipe, jobs: int = 2) -> list[Compiled]:
    heard: list[Compiled] = []
    Build(plan, Toolchain(Path("/"), "13.0", str(CXX), (), ()), jobs, heard.append).run()
    return heard


def test_the_module_has_its_own_runner_and_an_error_for_the_others(tmp_path: Path) -> None:
    plan = recipe(tmp_path, {"binding": BINDING, "own": OWN})
    heard = build(plan)
    assert {one.source for one in heard} == {"binding.cpp", "own.cpp"}
    assert all(one.peak_bytes > 1 << 20 and not one.reused for one in heard)
    assert max(one.cpu_s for one in heard) > 0
    assert symbols.of_flashinfer(symbols.undefined(plan.library)) == []
    assert "libcuda.so.1" not in {path.name for path in tmp_path.iterdir()}
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["format"], len(manifest["sources"])) == ("bf16", 2)

    # It asks for libcuda, which may not be here: an empty one is enough to open it.
    driver = tmp_path / "driver"
    driver.mkdir()
    stub = driver / "libcuda.so.1"
    Build(plan, Toolchain(Path("/"), "13.0", str(CXX), (), ()), 1, lambda _one: None)._execute(
        [str(CXX), "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c++", "/dev/null", "-o", str(stub)], "stub"
    )
    ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
    module = ctypes.CDLL(str(plan.library))
    assert module.own() == 7
    said = ctypes.create_string_buffer(201)
    assert module.other(said) == -1
    assert b"`sglang-dwdp build-kernels` for bf16 weights only" in said.value


def test_a_second_build_compiles_only_what_changed(tmp_path: Path) -> None:
    build(recipe(tmp_path, {"binding": BINDING, "own": OWN}))
    heard = build(recipe(tmp_path, {"binding": BINDING, "own": OWN.replace("7", "8")}))
    assert {one.source: one.reused for one in heard} == {"binding.cpp": True, "own.cpp": False}


def test_a_source_that_does_not_compile(tmp_path: Path) -> None:
    plan = recipe(tmp_path, {"binding": BINDING, "own": "int broken("})
    with pytest.raises(DwdpError, match=r"(?s)own\.cpp could not be compiled \(exit code 1\):.*error"):
        build(plan)
    assert not (tmp_path / MANIFEST).exists()
    heard = build(recipe(tmp_path, {"binding": BINDING, "own": OWN}), jobs=1)
    assert next(one for one in heard if one.source == "own.cpp").reused is False


def test_something_that_all_formats_need_is_missing(tmp_path: Path) -> None:
    plan = recipe(tmp_path, {"binding": BINDING, "own": OWN, "more": NEEDS_MORE})
    with pytest.raises(DwdpError, match=r"needs more for bf16 than is known here, tensorrt_llm::helper\(\) and 0 more"):
        build(plan)
    assert not plan.library.exists()


def test_one_build_at_a_time(tmp_path: Path) -> None:
    plan = recipe(tmp_path, {"binding": BINDING, "own": OWN})
    first = Build(plan, Toolchain(Path("/"), "13.0", str(CXX), (), ()), 1, lambda _one: None)
    with first._alone(), pytest.raises(DwdpError, match="another process is building small"):
        build(plan)
