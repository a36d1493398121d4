"""What is made of the measured times of MoE kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.moe_table import BEGIN, END, fastest, for_docs, for_terminal, insert, verdicts


def row(kernel: str, tokens: int, resident: float, view: float) -> dict[str, Any]:
    return {
        "model": "M",
        "format": "bf16",
        "kernel": kernel,
        "tokens": tokens,
        "resident_ms": resident,
        "view_ms": view,
        "rounds": 100,
    }


ROWS = [
    row("FlashInfer", 8192, 1.0, 1.01),
    row("FlashInfer", 8, 0.2, 0.2),
    row("Triton", 8192, 0.9, 0.99),
    row("Triton", 8, 0.3, 0.3),
    {"model": "M", "format": "bf16", "kernel": "DeepGEMM", "tokens": 8192, "error": "ImportError: | nothing\nmore"},
]


def test_the_fastest_is_judged_on_views() -> None:
    assert fastest(ROWS) == {("M", "bf16"): {8: "FlashInfer", 8192: "Triton"}}


def test_a_verdict_for_each_kernel_at_the_largest_forward() -> None:
    met, missed = verdicts(ROWS)
    assert "FlashInfer: +1.0 % at 8192 tokens, met" in met
    assert "Triton: +10.0 % at 8192 tokens, MISSED" in missed


def test_the_tables_have_every_kernel(tmp_path: Path) -> None:
    assert for_terminal(ROWS).row_count == len(ROWS)
    text = for_docs([{"gpu": "G", "flashinfer": "1", "sglang": "2", "rows": ROWS}])
    assert "| M | bf16 | Triton | 0.300 (+0.0 %) | **0.990 (+10.0 %)** |" in text
    assert "| M | bf16 | FlashInfer | **0.200 (+0.0 %)** | 1.010 (+1.0 %) |" in text
    assert "ImportError: / nothing" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    insert(page, text)
    insert(page, text)  # again: nothing piles up
    assert page.read_text() == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        insert(page, text)
