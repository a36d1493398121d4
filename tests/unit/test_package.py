"""The wheel, and where its modules are found."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sglang_dwdp import config as options
from tests import ROOT

# Found but not imported, which would import SGLang and take its time.
PRINT_PATHS = (
    "import sglang_dwdp; from importlib.metadata import entry_points; from importlib.util import find_spec; "
    "(plugin,) = entry_points(group='sglang.srt.plugins', name='dwdp'); plugin.load(); "
    "print(sglang_dwdp.__file__, find_spec('sglang_dwdp.srt_patches.hooks').origin)"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(directory)]
    subprocess.run([*command, str(ROOT)], check=True)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, which borrows the wheel's dependencies from this one."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)  # a pip of its own would take seconds
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--ignore-installed"]
    subprocess.run([*pip, str(wheel)], check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_claims_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sglang_dwdp"}
    stubs = ("cpu/stubs/sgl_kernel/__init__.py", "demo/stubs/flashinfer.py")
    for needed in ("srt_patches/ledger.md", "srt_patches/hooks.py", "py.typed", *stubs):
        assert f"sglang_dwdp/{needed}" in names
    packages = {path.parent.name for path in (ROOT / "sglang_dwdp").glob("*/__init__.py")}
    assert packages <= {name.split("/")[1] for name in names if name.startswith("sglang_dwdp/")}
    assert not [name for name in names if name.startswith("sglang_dwdp/kernels/")]


def test_a_server_needs_little(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    said = email.message_from_bytes(archive.read(metadata))
    assert said["License-Expression"] == "Apache-2.0"
    required = [Requirement(line) for line in said.get_all("Requires-Dist", [])]
    assert {one.name for one in required if one.marker is None} == {"sglang", "cuda-python", "rich"}
    assert set(said.get_all("Provides-Extra", [])) == {"planner", "bench", "disaggregation", "cuda12", "dev"}


def run(python: Path, arguments: Sequence[str], cwd: Path) -> str:
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"} | {"PYTHONPATH": ""}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment, check=True, capture_output=True, text=True, timeout=300
    ).stdout


def test_imported_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    for path in run(installed, ["-c", PRINT_PATHS], tmp_path).split():
        assert Path(path).is_relative_to(installed.parent.parent)


def test_imported_from_the_root_of_a_checkout(installed: Path) -> None:
    """There the working directory comes first: the checkout is used, and all of it."""
    for path in run(installed, ["-c", PRINT_PATHS], ROOT).split():
        assert Path(path).is_relative_to(ROOT)


def test_sglang_finds_the_flags(installed: Path, tmp_path: Path) -> None:
    text = run(installed, ["-m", "sglang.launch_server", "--help"], tmp_path)
    for name in options.option_names():
        assert "--" + name.replace("_", "-") in text


@pytest.mark.e2e
def test_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    text = run(installed, ["-m", "sglang_dwdp.cli", "demo", "--experts", "9"], tmp_path)
    assert text.count("5 of 5") == 2
    assert text.count("yes") == 2
