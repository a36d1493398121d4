"""Finding compilers, headers and libraries, with a toolkit made of scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_dwdp.errors import DwdpError
from tests.unit.kernels.script import script


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit for CUDA 13.0 that has everything, in CUDA_HOME; no pip packages."""
    home = tmp_path / "toolkit"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    for header in script._HEADERS:
        (home / "include" / header).touch()
    for library in ("libcudart.so.13", "libnvrtc.so.13"):
        (home / "lib64" / library).touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(script, "pip_folders", lambda _version: [])
    return home


def test_a_full_toolkit(toolkit: Path, tmp_path: Path) -> None:
    assert script.find_toolkit("13.0") == (toolkit, "13.0", [])
    link = script._link_folder(tmp_path / "link", toolkit, [], "13")
    assert (link / "libcudart.so").resolve() == toolkit / "lib64" / "libcudart.so.13"
    assert {path.name for path in link.iterdir()} == {"libcuda.so", "libcudart.so", "libnvrtc.so"}


def test_headers_and_libraries_of_pip_packages(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "cu13"
    for folder, name in (("include", "cublasLt.h"), ("lib", "libnvrtc.so.13")):
        (pip / folder).mkdir(parents=True)
        (pip / folder / name).touch()
    (toolkit / "include" / "cublasLt.h").unlink()
    (toolkit / "lib64" / "libnvrtc.so.13").unlink()
    monkeypatch.setattr(script, "pip_folders", lambda _version: [pip])
    assert script.find_toolkit("13.0")[2] == [pip]
    link = script._link_folder(tmp_path / "link", toolkit, [pip], "13")
    assert (link / "libnvrtc.so").resolve() == pip / "lib" / "libnvrtc.so.13"


def test_what_is_missing_is_named(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DwdpError, match=r"nvcc 13\.0 in .* is for CUDA 12\.8\. Set CUDA_HOME"):
        script.find_toolkit("12.8")
    (toolkit / "include" / "curand_kernel.h").unlink()
    with pytest.raises(DwdpError, match=r"curand_kernel\.h was not found in .*nvidia-curand"):
        script.find_toolkit("13.0")
    (toolkit / "lib64" / "libnvrtc.so.13").unlink()
    with pytest.raises(DwdpError, match=r"libnvrtc\.so\.13 was not found"):
        script._link_folder(tmp_path / "link", toolkit, [], "13")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(DwdpError, match=r"there is no bin/nvcc in .*nowhere"):
        script.find_toolkit("13.0")


def test_the_command_says_in_one_line_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert script.main(["--format", "bf16"]) == 1
    assert capsys.readouterr().err.startswith("kernels/build.py: error: there is no bin/nvcc")
    with pytest.raises(SystemExit):
        script.main(["--format", "fp16"])
