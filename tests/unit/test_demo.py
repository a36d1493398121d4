"""How the demo's servers are started."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_dwdp.demo import server
from tests.fixtures.model_modules import FEWER_MODELS, MODEL_MODULES


def test_servers_do_not_import_flashinfer() -> None:
    environment = {**os.environ, "PYTHONPATH": str(server.STUBS)}
    done = subprocess.run([sys.executable, "-c", "import flashinfer"], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ImportError: this is sglang_dwdp's stub of flashinfer")


@pytest.mark.parametrize(
    ("variables", "served"), [(server.fewer_models(), {"qwen3_moe"}), (FEWER_MODELS, MODEL_MODULES)]
)
def test_servers_import_the_models_that_are_served_and_no_others(variables: dict[str, str], served: set[str]) -> None:
    disabled = set(variables["SGLANG_DISABLED_MODEL_ARCHS"].split(","))
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    modules = {path.stem for path in (Path(spec.submodule_search_locations[0]) / "srt" / "models").glob("*.py")}
    assert modules - disabled - {"__init__"} == served


def test_a_free_port_leaves_room_above() -> None:
    assert 10000 <= server.free_port() < 20000
