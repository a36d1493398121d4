"""Tables of Triton configurations made from those of another number of experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_dwdp.cli import main
from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.tables import write_tables
from sglang_dwdp.planner.tuned import CONFIGS, sglang_folder

MODEL = load_model("qwen3-30b-a3b")  # 128 experts of 768
TWICE = replace(MODEL, experts=256)
NEWEST = "triton_3_10_0"


def name(count: int, end: str = "") -> str:
    return f"E={count},N=768,device_name=NVIDIA_H200{end}.json"


@pytest.fixture
def sglang(tmp_path: Path) -> Path:
    folder = tmp_path / "sglang"
    for version, file, config in (
        ("triton_3_2_0", name(128), {"8": {"BLOCK_SIZE_M": 1}}),
        (NEWEST, name(128), {"1": {"BLOCK_SIZE_M": 16}, "64": {"BLOCK_SIZE_M": 64}}),
        (NEWEST, name(128, "_down"), {"3": {"BLOCK_SIZE_M": 32}}),
        (NEWEST, name(16), {"1": {"BLOCK_SIZE_M": 2}}),
        (NEWEST, name(256, ",dtype=fp8_w8a8"), {"1": {"BLOCK_SIZE_M": 3}}),
    ):
        path = folder / CONFIGS / version / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
    return folder


def test_a_missing_table_has_as_many_rows_an_expert(sglang: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write_tables(TWICE, get_gpu("H200"), 4, sglang, out) == [
        name(count, end) for count in (64, 256) for end in ("", "_down")
    ]
    configs = out / "configs"
    for count in (64, 256):  # a share of 64 gets a quarter of the same rows
        table = json.loads((configs / NEWEST / name(count)).read_text())
        assert table == {"2": {"BLOCK_SIZE_M": 16}, "128": {"BLOCK_SIZE_M": 64}}
        assert json.loads((configs / NEWEST / name(count, "_down")).read_text()) == {"6": {"BLOCK_SIZE_M": 32}}
    copied = {file.relative_to(configs) for file in configs.rglob("*.json")}
    assert {file.relative_to(sglang / CONFIGS) for file in (sglang / CONFIGS).rglob("*.json")} < copied
    assert not list((sglang / CONFIGS).rglob(name(256)))  # SGLang's own folder is left alone


def test_what_sglang_has_stays(sglang: Path, tmp_path: Path) -> None:
    assert write_tables(MODEL, get_gpu("H200"), 8, sglang, tmp_path / "out") == []
    with pytest.raises(PlannerError, match="exists"):
        write_tables(MODEL, get_gpu("H200"), 8, sglang, tmp_path / "out")


def test_what_cannot_be_made(sglang: Path, tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="width 768 on H100"):
        write_tables(MODEL, get_gpu("H100"), 2, sglang, tmp_path / "out")
    with pytest.raises(PlannerError, match="3 ranks"):
        write_tables(MODEL, get_gpu("H200"), 3, sglang, tmp_path / "out")
    with pytest.raises(PlannerError, match="fp8, and these tables are for bf16"):
        write_tables(load_model("deepseek-r1"), get_gpu("H200"), 8, sglang, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_the_installed_sglang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SGLang's lookup finds what the command wrote."""
    pytest.importorskip("sglang")
    out = tmp_path / "out"
    assert main(["kernels", "qwen3-30b-a3b", "--gpu", "H200", "--group-size", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"added {name(64)}\n" in said
    assert f"export SGLANG_MOE_CONFIG_DIR={out}\n" in said
    folder = sglang_folder()
    assert folder is not None
    (added,) = (out / "configs").rglob(name(64))
    (original,) = (folder / CONFIGS / added.parent.name).glob(name(128))
    assert json.loads(added.read_text()) == json.loads(original.read_text())
    assert main(["kernels", "qwen3-30b-a3b", "--gpu", "H200", "--group-size", "2", "--out", str(out)]) == 1
    assert "exists" in capsys.readouterr().err
