"""What benchmark scripts say of files that they cannot read or write: one line, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import compare_serving, engines, gpu_links, moe_layer, reproduce_paper


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (compare_serving.main, ["{there}/nosuch.yaml"], "No such file"),
        (compare_serving.main, ["{there}/list.json"], "list.json: "),
        (engines.main, ["--cases", "prefill:x"], "'prefill:x' is no case"),
        (engines.main, ["--variants", "x"], "'x' is none of dwdp"),
        (engines.main, ["--cases"], "measures nothing"),
        (engines.main, ["--out", "{there}/binary/x"], "results cannot be written"),
        (gpu_links.main, ["--cpu", "--out", "{there}/binary/x.json"], "results cannot be written"),
        (moe_layer.main, ["--out", "x", "--shapes", "x"], "invalid choice: 'x'"),
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
        sys.exit(main())  # type: ignore[arg-type]
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
