"""The table of support: only tests that passed make a cell, and the page in docs/ is the one of its record."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fixtures.support_table import (
    BY_MODELS,
    FAMILIES,
    GPU_MODELS,
    PAGE,
    RECORD,
    WEIGHTS,
    evidence,
    on_gpu,
    outcomes,
    page,
    remember,
)
from tests.gpu.cases import ALL, FUSED

RESULTS = """<testsuites><testsuite>
<testcase classname="tests.e2e.test_models" name="test_parity[glm4_moe-2]"/>
<testcase classname="tests.e2e.test_models" name="test_parity[glm4_moe-3]"><failure message="x"/></testcase>
<testcase classname="tests.gpu.test_flashinfer" name="test_a_gpu[bf16]"><skipped/></testcase>
</testsuite></testsuites>"""


def test_outcomes(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(RESULTS)
    assert outcomes([tmp_path / "r.xml"]) == {
        "tests/e2e/test_models.py::test_parity[glm4_moe-2]": "passed",
        "tests/e2e/test_models.py::test_parity[glm4_moe-3]": "failed",
        "tests/gpu/test_flashinfer.py::test_a_gpu[bf16]": "skipped",
    }


def test_a_failure_takes_back_what_passed_before_and_a_skip_does_not() -> None:
    new = {"a": "failed", "b": "skipped", "c": "passed"}
    record = remember({"a": "1", "b": "1", "c": "failed 1", "d": "1"}, new, "2")
    assert record == {"a": "failed 2", "b": "1", "c": "2", "d": "1"}


def test_evidence_names_the_test() -> None:
    passed = {"t.py::test_x[a-1]": "2026-02-02", "t.py::test_x[a-2]": "2026-01-01", "t.py::test_y": "2026-01-01"}
    assert evidence(passed, r"t\.py::test_x\[a") == "verified: `test_x` (2 passed, 2026-01-01)"
    assert evidence(passed, r"t\.py::test_z") is None
    one_failed = passed | {"t.py::test_x[a-3]": "failed 2026-03-03"}
    assert evidence(one_failed, r"t\.py::test_x\[a") == "FAILED: `test_x` (1 of 3, 2026-03-03)"


def test_a_model_on_gpus_is_verified_with_all_its_ranks_only() -> None:
    case = next(case for case in ALL if case.ranks == (2, 3) and case.name not in FUSED)
    names = [f"{GPU_MODELS}test_parity[{case.name}-{ranks}]" for ranks in (2, 3)]
    assert on_gpu({names[0]: "2026-01-01"}, case) == "unverified"
    both = dict.fromkeys(names, "2026-01-01")
    assert on_gpu(both, case) == "verified: `test_parity` (2 passed, 2026-01-01)"
    assert on_gpu(both | {names[1]: "failed 2026-01-02"}, case).startswith("FAILED: `test_parity` (1 of 2")


def test_ways_without_a_layer_of_their_own_are_verified_by_models() -> None:
    for key in BY_MODELS:
        case = next(case for case in ALL if (WEIGHTS[case.weights], case.backend) == key)
        record = {f"{GPU_MODELS}test_parity[{case.name}-{ranks}]": "2026-01-01" for ranks in case.ranks}
        row = next(line for line in page(record).splitlines() if line.startswith(f"| {key[0]} | `{key[1]}` |"))
        assert f"verified: `test_parity` ({len(case.ranks)} passed" in row
        assert row.endswith("| unverified |")  # on Blackwell


def test_every_model_on_gpus_has_its_words() -> None:
    assert {case.family for case in ALL} <= set(FAMILIES)
    assert {case.weights for case in ALL} <= set(WEIGHTS)


def test_nothing_is_called_verified_without_a_result() -> None:
    text = page({})
    assert "verified:" not in text.replace("unverified:", "")
    assert "| Qwen3-MoE | unverified |" in text
    assert "refused: it makes its tables of pointers" in text


def test_the_page_is_the_one_of_the_record() -> None:
    assert PAGE.read_text() == page(json.loads(RECORD.read_text()))
