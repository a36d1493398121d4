"""With speculative decoding too, every rank gives the tokens and, bitwise, the log-probabilities of a rank that holds
all experts, and accepts as many drafts.

    python -m pytest -m "gpu and models" tests/gpu/test_drafts.py

As tests/gpu/test_models.py, whose variables and folders are used.
"""

from __future__ import annotations

import pytest

from tests.gpu.cases import BASE, BY_NAME, DRAFTS, LENGTHS, NEW_TOKENS
from tests.gpu.test_models import RESUME, Engines, assert_decodes_by_graphs
from tests.gpu.test_models import engines as engines  # the fixture

pytestmark = [pytest.mark.models] if RESUME else [pytest.mark.gpu(3), pytest.mark.models]


@pytest.mark.parametrize(("name", "ranks"), [(case.name, ranks) for case in DRAFTS for ranks in case.ranks])
def test_parity(engines: Engines, name: str, ranks: int) -> None:
    case = BY_NAME[name]
    expected = engines.result(case, 1)["answers"][0]
    result = engines.result(case, ranks)
    assert len({tuple(answer[0]) for answer in expected}) > len(LENGTHS) // 2, "degenerate answers compare nothing"
    verified = sum(answer[3] for answer in expected)
    assert 0 < verified < len(LENGTHS) * NEW_TOKENS
    if case.head != "eagle3":  # whose random head is never right
        assert verified < len(LENGTHS) * (NEW_TOKENS - 2), "too few drafts are accepted to compare anything"
    assert len(result["answers"]) == ranks
    for rank, answers in enumerate(result["answers"]):
        for length, got, wanted in zip(LENGTHS, answers, expected, strict=True):
            assert got[0] == wanted[0], f"tokens of rank {rank} after {length} tokens"
            assert got[1] == wanted[1], f"log-probabilities of rank {rank} after {length} tokens"
            assert got[3] == wanted[3], f"verifying forwards of rank {rank} after {length} tokens"
    dense = 1 if case.shape.get("draft_layers") else 0
    for report in result["reports"]:
        assert report["direct_forwards"] > 0
        assert report["staged_forwards"] > 0
        assert report["moe_layers"] == BASE["num_layers"] - dense + case.shape.get("draft_layers", 0)
    assert "Capture draft decode CUDA graph end" in result["log"]
    assert "Capture draft extend CUDA graph end" in result["log"]
    assert_decodes_by_graphs(result["log"], ranks)
