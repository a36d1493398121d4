"""Measured figures in place of a GPU's own."""

from pathlib import Path

import pytest

from sglang_dwdp.planner.checks import PlannerError
from sglang_dwdp.planner.gpus import get_gpu, with_file


def _file(folder: Path, text: str) -> str:
    path = folder / "gpu.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "copy_bandwidth: 300.0e+9\nefficiency: {attention: 0.5}",
        '{"copy_bandwidth": 3e+11, "efficiency": {"attention": 0.5}}',
    ],
)
def test_what_a_file_says_replaces_what_is_known(tmp_path: Path, text: str) -> None:
    path = _file(tmp_path, text)
    known, found = get_gpu("H100"), with_file(get_gpu("H100"), path)
    assert found.copy_bandwidth == 300e9
    assert found.efficiency.attention == 0.5
    assert found.efficiency.dense_gemm == known.efficiency.dense_gemm
    assert found.pair_bandwidth == known.pair_bandwidth
    assert found.sources["copy_bandwidth"] == path
    assert found.sources["memory"] == known.sources["memory"]


def test_a_file_can_name_another_gpu(tmp_path: Path) -> None:
    path = _file(tmp_path, "name: H20\nmemory: 96.0e+9\npeak_flops: {bf16: 148.0e+12}\nsources: {memory: its sheet}")
    found = with_file(get_gpu("H200"), path)
    assert found.name == "H20"
    assert found.peak_flops["bf16"] == 148e12
    assert found.sources["memory"] == "its sheet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("speed: 3", "speed: "),
        ("memory: -1", "memory: .* greater than 0, not -1"),
        ("copy_bandwidth: fast", "copy_bandwidth: .*'fast'"),
        ("copy_bandwidth: .nan", "copy_bandwidth: "),
        ("efficiency: {attention: 1.5}", "attention: .* equal to 1"),
        ("efficiency: {speed: 1}", "speed: "),
        ("efficiency: 3", "efficiency must be a mapping"),
    ],
)
def test_bad_files_are_reported_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(PlannerError, match=message) as caught:
        with_file(get_gpu("H100"), path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="No such file"):
        with_file(get_gpu("H100"), str(tmp_path / "none.yaml"))
