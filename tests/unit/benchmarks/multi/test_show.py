"""Tables and targets of the parts, from results as ranks write them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from benchmarks.multi import show
from benchmarks.multi.copies import DEFAULT_KIB
from benchmarks.multi.reference import best, joined


def shown(*what: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*what)
    return console.export_text()


def copies_result(one_way: float = 390e9, both: float = 350e9) -> dict[str, Any]:
    def row(kind: str, reads: list[list[int]], rate: float, kib: int = DEFAULT_KIB) -> dict[str, Any]:
        readers = {reader for reader, _ in reads}
        figures = [{"bytes_per_s": rate, "product_slowdown": 1.1} if rank in readers else {} for rank in range(2)]
        return {"kind": kind, "reads": reads, "slice_kib": kib, "engine": "default", "by_rank": figures}

    rows = [
        row("one way", [[0, 1]], one_way),
        row("one way", [[1, 0]], one_way + 5e9),
        row("one way", [[1, 0]], 9e9, 1024),
        row("both ways", [[0, 1], [1, 0]], both),
    ]
    reference = [
        {"reads": [[0, 1]], "bytes_per_s": {"torch": 380e9, "driver": 400e9}},
        {"reads": [[1, 0]], "bytes_per_s": {"torch": 400e9, "driver": 380e9}},
        {"reads": [[0, 1], [1, 0]], "bytes_per_s": {"torch": 370e9, "driver": 360e9}},
    ]
    return {"rows": rows, "reference": reference}


def test_targets_are_of_the_worst_pair_at_the_default_slices() -> None:
    one_way, both = show.copy_targets(copies_result())
    assert one_way.reached == pytest.approx(390 / 400)
    assert one_way.verdict == "met"
    assert both.reached == pytest.approx(350 / 370)
    assert both.verdict == "missed"
    assert json.loads(json.dumps(both.to_json()))["verdict"] == "missed"
    assert [target.verdict for target in show.copy_targets({})] == ["not measured"] * 2
    table = shown(show.target_table([one_way, both]))
    assert "0.975" in table
    assert "missed" in table


def test_a_pair_is_compared_with_its_own_large_copy() -> None:
    result = copies_result()
    assert best(result["reference"], [[1, 0], [0, 1]]) == 370e9
    assert best(result["reference"], [[0, 2]]) is None
    rows = result["rows"]
    assert show.copy_ratio(result, rows[1]) == pytest.approx(395 / 400)
    # Ranks of one GPU have the one copy within it; more than two at once have that of one pair.
    alone = {"reference": [{"reads": [[0, 0]], "bytes_per_s": {"torch": 1e12, "driver": 9e11}}]}
    assert show.copy_ratio(alone, rows[0]) == pytest.approx(0.39)


def test_methods_of_the_same_reads_stand_side_by_side() -> None:
    """With ranks that share a GPU, the one process copies within it, and only the ranks have pairs."""
    rows = copies_result()["reference"]
    more = [
        {"reads": [[1, 0], [0, 1]], "bytes_per_s": {"ranks": 371e9}},
        {"reads": [[2, 0]], "bytes_per_s": {"ranks": 1}},
    ]
    result = joined(rows, more)
    assert [row["reads"] for row in result] == [[[0, 1]], [[1, 0]], [[0, 1], [1, 0]], [[2, 0]]]
    assert result[2]["bytes_per_s"] == {"torch": 370e9, "driver": 360e9, "ranks": 371e9}
    assert best(result, [[0, 1], [1, 0]]) == 371e9
    assert "ranks" not in rows[2]["bytes_per_s"]


def test_tables_of_copies_and_reads() -> None:
    table = shown(show.copy_table(copies_result()), show.reference_table(copies_result()))
    assert "0 ← 1, 1 ← 0" in table
    assert "32 MiB *" in table
    assert "1.100 x" in table
    seconds = {"peers": 2e-3, "resident": 1e-3, "view, all experts": 3e-3, "resident, all experts": 2e-3}
    slower = seconds | {"peers": 4e-3}
    ranks = [
        {"same": True, "bytes": 2**30, "traffic": 2**31, "alone_s": seconds, "together_s": each}
        for each in (seconds, slower)
    ]
    result = {"rows": [{"tokens": 8192, "by_rank": ranks}], "devices": ["NVIDIA H100 80GB HBM3"] * 2}
    table = shown(show.read_table(result))
    for text in ("8,192", "2.0 x", "1,073.7", "536.9", "4.00", "1.50", "equal"):
        assert text in table
    ranks[1]["same"] = False
    assert "DIFFERENT" in shown(show.read_table(result))
    line = show.planned_read_line(result)
    assert "1,073.7 GB/s measured" in line
    assert "planned for H100" in line
    assert "does not know" in show.planned_read_line(result | {"devices": ["CPU"]})
    assert "nothing" in show.planned_read_line({})
