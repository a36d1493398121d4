"""What serves requests does not need what plans and shows: no module of it imports `planner`, `demo` or `doctor`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "sglang_dwdp"
NOT_SERVING = ("planner", "demo", "doctor", "cli.py")
SERVING = sorted(
    path.relative_to(ROOT)
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "srt_patches").rglob("*.py"))
    if path.relative_to(ROOT).parts[1] not in NOT_SERVING
)


def imported(path: Path) -> Iterator[str]:
    """The parts of this package that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("sglang_dwdp."))


def test_there_is_something_to_look_at() -> None:
    assert {Path("sglang_dwdp/runtime.py"), Path("srt_patches/resolve.py")} <= set(SERVING)
    assert "config" in set(imported(Path("sglang_dwdp/runtime.py")))


@pytest.mark.parametrize("path", SERVING, ids=str)
def test_what_serves_imports_no_planner_demo_or_doctor(path: Path) -> None:
    assert not {"planner", "demo", "doctor"} & set(imported(path))
