"""Finding compilers, headers and libraries, with a toolkit made of scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_dwdp.cli import main
from sglang_dwdp.errors import DwdpError
from sglang_dwdp.kernels_build import toolchain

HEADERS = ("cublasLt.h", "curand_kernel.h", "nvrtc.h")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit for CUDA 13.0 that has everything, in CUDA_HOME; no pip packages."""
    home = tmp_path / "toolkit"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\necho '#$ TOP={home}' >&2\n")
    nvcc.chmod(0o755)
    for header in HEADERS:
        (home / "include" / header).touch()
    for library in ("libcudart.so.13", "libnvrtc.so.13"):
        (home / "lib64" / library).touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(toolchain, "pip_folders", lambda _version: [])
    return home


def test_a_full_toolkit(toolkit: Path) -> None:
    found = toolchain.find("13.0")
    assert (found.cuda_home, found.cuda_version, found.includes) == (toolkit, "13.0", ())
    assert [path.name for path in found.libraries] == ["libcudart.so.13", "libnvrtc.so.13"]


def test_an_nvcc_on_the_path_that_is_a_script_elsewhere(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "elsewhere" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    assert toolchain.find("13.0").cuda_home == toolkit


def test_headers_and_libraries_of_pip_packages(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "cu13"
    for folder, name in (("include", "cublasLt.h"), ("lib", "libnvrtc.so.13")):
        (pip / folder).mkdir(parents=True)
        (pip / folder / name).touch()
    (toolkit / "include" / "cublasLt.h").unlink()
    (toolkit / "lib64" / "libnvrtc.so.13").unlink()
    monkeypatch.setattr(toolchain, "pip_folders", lambda _version: [pip])
    found = toolchain.find("13.0")
    assert found.includes == (pip / "include",)
    assert found.libraries[1] == pip / "lib" / "libnvrtc.so.13"


def test_what_is_missing_is_named(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DwdpError, match=r"nvcc 13\.0 in .* is for CUDA 12\.8: the major versions differ"):
        toolchain.find("12.8")
    (toolkit / "include" / "curand_kernel.h").unlink()
    with pytest.raises(DwdpError, match=r"curand_kernel\.h was not found in .*nvidia-curand"):
        toolchain.find("13.0")
    (toolkit / "include" / "curand_kernel.h").touch()
    (toolkit / "lib64" / "libnvrtc.so.13").unlink()
    with pytest.raises(DwdpError, match=r"libnvrtc\.so\.13 was not found"):
        toolchain.find("13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(DwdpError, match=r"CUDA_HOME is .*nowhere, which has no bin/nvcc"):
        toolchain.find("13.0")


def test_the_command_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-kernels", "--format", "bf16", "--arch", "10.0a"]) == 1
    assert capsys.readouterr().err.startswith("sglang-dwdp: error: --arch 10.0a: slim kernels exist for 9.0a")
    with pytest.raises(SystemExit):
        main(["build-kernels", "--format", "fp16"])
