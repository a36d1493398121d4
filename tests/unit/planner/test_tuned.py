"""Whether SGLang has tuned kernels for the experts that a plan is about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sglang_dwdp.planner.cost import Group
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.tuned import sglang_folder, untuned_notes

MODEL = load_model("qwen3-30b-a3b")  # 128 experts of 768
FILES = (
    "triton_3_2_0/E=128,N=768,device_name=NVIDIA_H200.json",
    "triton_3_6_0/E=64,N=768,device_name=NVIDIA_H100_80GB_HBM3.json",
    "triton_3_6_0/E=64,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8.json",
    "triton_3_6_0/E=64,N=768,device_name=NVIDIA_H200_down.json",
    "triton_3_6_0/E=64,N=7680,device_name=NVIDIA_H200.json",
)
DWDP, DEP = "128 experts of 768 on {}, so DWDP and", "64 experts of 768 on {}, so DEP and"


@pytest.fixture
def sglang(tmp_path: Path) -> Path:
    folder = tmp_path / "srt/layers/moe/moe_runner/triton_utils/configs"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("gpu", "weights", "missing"),
    [("H200", "bf16", [DEP]), ("H100", "bf16", [DWDP]), ("H200", "fp8", []), ("MI355X", "bf16", [])],
)
def test_what_is_not_tuned(sglang: Path, gpu: str, weights: str, missing: list[str]) -> None:
    notes = untuned_notes(MODEL, get_gpu(gpu), weights, Group(2), sglang)
    assert len(notes) == len(missing)
    for note, text in zip(notes, missing, strict=True):
        assert text.format(gpu) in note


def test_a_width_without_any_file_is_not_tuned(sglang: Path) -> None:
    other = replace(MODEL, moe_intermediate=1000)
    assert len(untuned_notes(other, get_gpu("H200"), "bf16", Group(2), sglang)) == 2


def test_nothing_is_said_where_it_cannot_be_known(tmp_path: Path) -> None:
    assert untuned_notes(MODEL, get_gpu("H200"), "bf16", Group(2), None) == []
    assert untuned_notes(MODEL, get_gpu("H200"), "bf16", Group(2), tmp_path) == []  # another SGLang


def test_the_files_of_sglang() -> None:
    """As its log says on such machines: 128 are tuned, 64 on H100 alone, 256 nowhere."""
    pytest.importorskip("sglang")
    twice = replace(MODEL, experts=256)
    found = [
        len(untuned_notes(model, get_gpu(gpu), "bf16", Group(2), sglang_folder()))
        for model in (MODEL, twice)
        for gpu in ("H100", "H200")
    ]
    assert found == [0, 1, 1, 1]
