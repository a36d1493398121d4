"""What benchmark scripts say of files that they cannot read or write: one line, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import moe_layer, multi_gpu, reproduce_paper, serving_table


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (serving_table.main, ["{there}/nosuch.json"], "RESULTS.json has to be what compare_serving.py wrote"),
        (serving_table.main, ["{there}/list.json"], "RESULTS.json has to be what compare_serving.py wrote"),
        (serving_table.main, ["{there}/binary"], "RESULTS.json has to be what compare_serving.py wrote"),
        (moe_layer.main, ["--docs", "{there}/list.json"], "--docs takes files that this script wrote"),
        (multi_gpu.main, ["--out", "{there}/binary/x.json"], "results cannot be written"),
        (reproduce_paper.main, ["--requests", "0"], "at least one is needed"),
    ],
)
def test_one_line(
    main: Callable[[], object],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *(one.format(there=tmp_path) for one in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
