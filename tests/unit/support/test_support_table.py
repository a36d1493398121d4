"""The page of support: a cell is validated by tests that passed alone, and the page in docs/ is up to date."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

from sglang_dwdp.support.conflicts import CONFLICTS
from sglang_dwdp.support.models import VALIDATED, VALIDATED_ON_CPU
from tests.fixtures import model_table, vision
from tests.fixtures.conflict_table import rows
from tests.fixtures.families import Family, Shape, config
from tests.fixtures.support_table import (
    BY_MODELS,
    FAMILIES,
    GPU_DRAFTS,
    GPU_MODELS,
    IMAGES,
    MODELS,
    MODELS_PAGE,
    PAGE,
    RECORD,
    WEIGHTS,
    evidence,
    on_gpu,
    outcomes,
    page,
    remember,
)
from tests.gpu.cases import ALL, DRAFTS, FUSED

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


def test_evidence_is_as_old_as_the_oldest_pass() -> None:
    passed = {"t.py::test_x[a-1]": "2026-02-02", "t.py::test_x[a-2]": "2026-01-01", "t.py::test_y": "2026-01-01"}
    assert evidence(passed, r"t\.py::test_x\[a") == "validated 2026-01-01"
    assert evidence(passed, r"t\.py::test_z") is None
    one_failed = passed | {"t.py::test_x[a-3]": "failed 2026-03-03"}
    assert evidence(one_failed, r"t\.py::test_x\[a") == "FAILED (1 of 3 tests, 2026-03-03)"


def test_a_model_on_gpus_is_validated_only_with_all_its_ranks() -> None:
    case = next(case for case in ALL if case.ranks == (2, 3) and case.name not in FUSED)
    names = [f"{GPU_MODELS}test_parity[{case.name}-{ranks}]" for ranks in (2, 3)]
    assert on_gpu({names[0]: "2026-01-01"}, case) == "unvalidated"
    both = dict.fromkeys(names, "2026-01-01")
    assert on_gpu(both, case) == "validated 2026-01-01"
    assert on_gpu(both | {names[1]: "failed 2026-01-02"}, case).startswith("FAILED (1 of 2")


def test_backends_without_a_test_of_a_layer_are_validated_by_models() -> None:
    for weights, backend in BY_MODELS:
        case = next(case for case in ALL if case.runs == (weights, backend))
        record = {f"{GPU_MODELS}test_parity[{case.name}-{ranks}]": "2026-01-01" for ranks in case.ranks}
        formats = page(record).split("## Weight formats")[1]
        assert f"| {weights} | `{backend}` | validated 2026-01-01 | " in formats


def test_a_model_has_a_row_with_a_cell_for_each_backend() -> None:
    case = next(case for case in ALL if case.backend == "deep_gemm")
    text = page({f"{GPU_MODELS}test_parity[{case.name}-{ranks}]": "2026-01-01" for ranks in case.ranks})
    row = f"| {FAMILIES[case.family]} | {WEIGHTS[case.weights]} | unvalidated | 2, 3 (2026-01-01) | "
    assert sum(line.startswith(row) for line in text.splitlines()) == 1


def test_drafts_are_validated_only_with_all_their_cases() -> None:
    names = [
        f"{GPU_DRAFTS}test_parity[{case.name}-{ranks}]"
        for case in DRAFTS
        for ranks in case.ranks
        if (case.family, case.options["speculative_algorithm"]) == ("deepseek_v3", "NEXTN")
    ]
    assert len(names) > 2
    record = dict.fromkeys(names, "2026-01-01")
    assert "\n- NEXTN: DeepSeek-V3 / R1 2, 3 (2026-01-01), GLM-4.5 unvalidated\n" in page(record)
    del record[names[-1]]
    assert "\n- NEXTN: DeepSeek-V3 / R1 unvalidated, GLM-4.5 unvalidated\n" in page(record)


def test_models_on_cpus_are_grouped_by_outcome() -> None:
    record = {"tests/e2e/test_parity.py::test_qwen2_moe_x": "2026-01-01"}
    record |= {"tests/e2e/test_models.py::test_parity[mixtral-2]": "2026-01-02"}
    text = page(record)
    assert "\n- validated 2026-01-01: Qwen2-MoE\n" in text
    assert "\n- validated 2026-01-02: Mixtral\n" in text


def test_every_model_on_gpus_has_a_name() -> None:
    assert {case.family for case in ALL} <= set(FAMILIES)
    assert all(case.weights in WEIGHTS or case.runs in BY_MODELS for case in ALL)


def test_models_validated_on_the_cpu_engine_have_passed() -> None:
    record = json.loads(RECORD.read_text())
    passed = {
        name
        for family in get_args(Family)
        if (evidence(record, rf"{MODELS}test_parity\[{family}-") or "").startswith("validated")
        for name in config(family, Shape())["architectures"]
    }
    passed |= {
        vision.architecture(family)
        for family in get_args(vision.VisionFamily)
        if (evidence(record, rf"{IMAGES}test_parity\[{family}-") or "").startswith("validated")
    }
    assert passed - VALIDATED == VALIDATED_ON_CPU


def test_nothing_is_called_validated_without_a_result() -> None:
    text = page({})
    assert "validated 2" not in text
    assert "(20" not in text
    assert "| Qwen3-MoE | bf16 | unvalidated | unvalidated | unvalidated |" in text
    assert "\n- unvalidated: Qwen3-MoE, Qwen2-MoE, " in text
    assert "| it makes its tables of pointers" in text


def test_every_conflict_has_a_row() -> None:
    reason = "--a-b {args.a_b} is not --kt-*, e.g. a|b"
    conflict = dataclasses.replace(CONFLICTS[0], reason=reason, way_out="Drop --a-b.")
    assert rows([conflict]) == [r"| `--a-b` … is not `--kt-*`, e.g. a\|b | Drop `--a-b`. |"]
    table = page({}).split("| unsupported, and why |")[1].split("\n\n")[0].splitlines()[2:]
    assert table == rows(CONFLICTS)


def test_the_pages_are_up_to_date() -> None:
    assert PAGE.read_text() == page(json.loads(RECORD.read_text())), "run python -m tests.fixtures.support_table"
    assert MODELS_PAGE.read_text() == model_table.page(), "run python -m tests.fixtures.support_table"
