"""The table of support: only tests that passed make a cell, and the page in docs/ is the one of its record."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support_table import PAGE, RECORD, evidence, outcomes, page, remember

RESULTS = """<testsuites><testsuite>
<testcase classname="tests.e2e.test_models" name="test_parity[glm4_moe-2]"/>
<testcase classname="tests.e2e.test_models" name="test_parity[glm4_moe-3]"><failure message="x"/></testcase>
<testcase classname="tests.test_flashinfer_on_gpu" name="test_a_gpu[bf16]"><skipped/></testcase>
</testsuite></testsuites>"""


def test_outcomes(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(RESULTS)
    assert outcomes([tmp_path / "r.xml"]) == {
        "tests/e2e/test_models.py::test_parity[glm4_moe-2]": "passed",
        "tests/e2e/test_models.py::test_parity[glm4_moe-3]": "failed",
        "tests/test_flashinfer_on_gpu.py::test_a_gpu[bf16]": "skipped",
    }


def test_a_failure_takes_back_what_passed_before_and_a_skip_does_not() -> None:
    new = {"a": "failed", "b": "skipped", "c": "passed"}
    assert remember({"a": "1", "b": "1", "d": "1"}, new, "2") == {"b": "1", "c": "2", "d": "1"}


def test_evidence_names_the_test() -> None:
    passed = {"t.py::test_x[a-1]": "2026-02-02", "t.py::test_x[a-2]": "2026-01-01", "t.py::test_y": "2026-01-01"}
    assert evidence(passed, r"t\.py::test_x\[a") == "verified: `test_x` (2 passed, 2026-01-01)"
    assert evidence(passed, r"t\.py::test_z") is None


def test_nothing_is_called_verified_without_a_result() -> None:
    text = page({})
    assert "verified:" not in text.replace("unverified:", "")
    assert "| Qwen3-MoE | unverified |" in text
    assert "refused: it makes its tables of pointers" in text


def test_the_page_is_the_one_of_the_record() -> None:
    assert PAGE.read_text() == page(json.loads(RECORD.read_text()))
