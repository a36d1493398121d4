"""A whole comparison with stand-ins for SGLang: failures, resuming, tables and the report."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.serving import client, deployment, launch
from benchmarks.serving.compare import Deadline, compare, write_json
from benchmarks.serving.figures import as_record, from_record
from benchmarks.serving.progress import Display
from benchmarks.serving.read import scenario_from
from benchmarks.serving.report import write_report
from benchmarks.serving.results import Results
from benchmarks.serving.scenario import Scenario
from benchmarks.serving.tables import failures, sheets
from benchmarks.serving_table import kept, tables
from tests import ROOT
from tests.unit.benchmarks.serving.fakes import BENCHMARK, SERVER

SECONDS = "0.4"


def scenario(together: int = 1, **modes: str) -> Scenario:
    """Variants whose server does what its mode says, given as a flag."""
    variants = {name: {"kind": "dwdp", "ranks": 2, "flags": {"mode": mode}} for name, mode in modes.items()}
    data = {
        "model": {"path": "some/model"},
        "gpus": 2,
        "load": {"lengths": {"length": 10}, "output_tokens": 4, "requests": 4, "rates": [2], "concurrencies": [3]},
        "check": {"requests": 2, "new_tokens": 4},
        "start_timeout_s": 30,
        "run_timeout_s": 30,
        "together": together,
        "variants": variants,
    }
    return scenario_from(data, "fake")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def server(_model: str, port: int, flags: Any) -> list[str]:
        return [sys.executable, "-c", SERVER, str(port), flags["mode"]]

    def benchmark(where: Any, _model: str, _load: Any, _point: Any, _file: Any, out: Path) -> list[str]:
        return [sys.executable, "-c", BENCHMARK, where.url, str(out), SECONDS]

    monkeypatch.setattr(launch, "server_command", server)
    monkeypatch.setattr(client, "command", benchmark)
    monkeypatch.setattr(deployment, "fewer_models", dict)


def run(whole: Scenario, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 0) -> tuple[Results, str]:
    monkeypatch.setenv("COMPARISON", str(folder))  # marks every process that it starts
    results, output = Results(whole, folder), io.StringIO()
    with Display(Console(file=output, width=300), 4) as display:
        compare(whole, whole.variants, "some/model", results, display, Deadline(seconds))
    return results, output.getvalue()


def processes(folder: Path) -> list[str]:
    mark, found = f"COMPARISON={folder}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.name != str(os.getpid()) and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_text())
    return found


@pytest.mark.parametrize("together", [1, 2, 5])
def test_one_that_cannot_start_and_one_that_dies_do_not_stop_the_others(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scenario(together, first="well", broken="refuses", mortal="dies", slow="lingers", last="wrong")
    results, output = run(whole, tmp_path, monkeypatch)
    assert processes(tmp_path) == []
    errors = dict(failures(results))
    assert set(errors) == {"broken", "mortal", "slow"}
    assert (
        "1 of 2 requests failed, the first with: ServerDisconnectedError; a scheduler of slow failed: "
        in errors["slow"]
    )
    assert "RuntimeError: no more memory" in errors["slow"]
    assert "broken ended with exit code 1: sglang-dwdp: error: this cannot work here" in errors["broken"]
    assert "mortal ended with exit code 9: RuntimeError: out of luck" in errors["mortal"]
    assert "Traceback" not in output
    by_name = {variant.name: variant for variant in whole.variants}
    assert all(results.complete(by_name[name]) for name in ("first", "last"))

    figures, ratios, *_ = sheets(results)
    assert [row[0] for row in figures.rows] == ["first", "last"]
    first, last = (dict(zip(figures.headings, row, strict=True)) for row in figures.rows)
    assert (first["same tokens as first"], last["same tokens as first"]) == ("100%", "0%")
    assert (first["out/GPU"], first["in+out/GPU"]) == ("50.0", "550")
    assert first["most requests on a rank"] == "1 4"
    assert ratios.rows[0] == ["first", "–", "1.00 / 1.00 / 1.00 / 1.00"]
    assert "requests on rank 1 over time, at most      4: █" in output

    html = write_report(results, {"processor": "<none>"}).read_text()
    assert html.count("<svg") == 5  # throughput, TTFT, exposed copies, queues at two load points
    assert "&lt;none&gt;" in html
    assert "this cannot work here" in html
    assert "src=" not in html  # nothing is fetched from elsewhere
    data = json.loads(write_json(results, {}).read_text())
    assert data["variants"]["mortal"]["error"] == errors["mortal"]
    assert [json.dumps(as_record(from_record(record))) for record in data["figures"]] == [
        json.dumps(record) for record in data["figures"]
    ]
    printed = tables(results.folder / "results.json", queues=True)
    for sheet in sheets(results):
        assert all(f"| {' | '.join(row)} |" in printed for row in sheet.rows)
    assert f"mortal did not run: {errors['mortal']}" in printed
    assert "requests on rank 1 over time, at most      4: █" in printed
    (results.folder / "kept.json").write_text(json.dumps(kept(data)))
    assert tables(results.folder / "kept.json", queues=True) == re.sub(r" \(log: [^)]*\)", "", printed)
    assert str(tmp_path) not in (results.folder / "kept.json").read_text()
    run_json = data["variants"]["first"]["runs"]["rate-2"]
    assert "generated_texts" not in run_json["benchmark"]
    assert len(run_json["benchmark"]["text_hashes"]) == 2
    assert run_json["dwdp"][1]["exposed_copy_s"] == 0.0  # of this run, not since the server's start


def test_a_second_call_runs_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scenario(first="well", second="well")
    results, _ = run(whole, tmp_path, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in results.runs.glob("*.json")}
    assert len(before) == 6
    (results.runs / "second.rate-2.json").unlink()
    (results.runs / "first.tokens.json").write_text("{ cut sh")  # as an interruption would never leave it
    results, output = run(whole, tmp_path, monkeypatch)
    after = {path: path.stat().st_mtime_ns for path in results.runs.glob("*.json")}
    assert {path.name for path in after if after[path] != before.get(path)} == {
        "second.rate-2.json",
        "first.tokens.json",
    }
    assert "kept from an earlier call" not in output
    _, output = run(whole, tmp_path, monkeypatch)
    assert output.count("kept from an earlier call") == 2

    changed = scenario(first="well", second="wrong")
    assert Results(changed, tmp_path).complete(changed.variants[0])
    assert not Results(changed, tmp_path).complete(changed.variants[1])


def test_servers_that_run_together_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scenario(2, a="well", b="well", c="well")
    results, output = run(whole, tmp_path, monkeypatch)
    steps = [(line[0], "requests/s" in line, "in flight" in line) for line in output.splitlines() if ": TTFT" in line]
    rate, flight = (True, False), (False, True)
    assert steps == [(v, *p) for group in ("ab", "c") for p in (rate, flight) for v in group]
    starts = [line[0] for line in output.splitlines() if "serving after" in line]
    assert starts == ["a", "b", "c"]
    assert all(results.complete(variant) for variant in whole.variants)
    assert processes(tmp_path) == []


@pytest.mark.parametrize("together", [1, 2])
def test_an_interruption_leaves_no_process_and_keeps_what_is_done(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scenario(together, first="well", second="well")
    polled = []

    def interrupted(text: str) -> None:
        polled.append(text)
        if "in flight" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "doing", lambda _self, text: interrupted(text))
        with pytest.raises(KeyboardInterrupt):
            run(whole, tmp_path, monkeypatch)
    assert processes(tmp_path) == []
    results = Results(whole, tmp_path)
    assert [point.key for point in results.missing(whole.variants[0])] == ["concurrency-3"]
    results, _ = run(whole, tmp_path, monkeypatch)
    assert all(results.complete(variant) for variant in whole.variants)


def test_after_the_time_limit_nothing_new_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scenario(first="well")
    results, output = run(whole, tmp_path, monkeypatch, seconds=1e-6)
    assert output.count("left for the next call") == 1
    assert results.error(whole.variants[0]) is None
    assert sheets(results) == []


def test_a_benchmark_that_fails_or_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(program: str) -> Any:
        return lambda *_arguments: [sys.executable, "-c", program]

    whole = scenario(first="well")
    monkeypatch.setattr(
        client, "command", command("raise SystemExit('serving.py: error: unrecognized arguments: --x')")
    )
    results, _ = run(whole, tmp_path, monkeypatch)
    assert "the benchmark ended with exit code 1: serving.py: error: unrecognized" in str(
        results.error(whole.variants[0])
    )
    monkeypatch.setattr(client, "command", command("import time; time.sleep(60)"))
    object.__setattr__(whole, "run_timeout_s", 8.0)
    results, _ = run(whole, tmp_path, monkeypatch)
    assert "the benchmark took longer than 8 s (run_timeout_s" in str(results.error(whole.variants[0]))
    assert processes(tmp_path) == []


def test_requests_that_failed_are_no_result() -> None:
    with pytest.raises(client.RunError, match="1 of 2 requests failed, the first with: Timeout: it took too long"):
        client.condense({"errors": ["", "Traceback\nTimeout: it took too long\n"], "generated_texts": []})


def test_the_command_line(tmp_path: Path) -> None:
    import subprocess

    script = ROOT / "benchmarks" / "compare_serving.py"
    scenario_file = tmp_path / "s.yaml"
    good = {
        "model": {"path": "some/model"},
        "gpus": 2,
        "load": {"lengths": {"length": 10}, "output_tokens": 4, "requests": 4, "rates": [2]},
        "variants": {"ours": {"kind": "dwdp"}},
    }

    def call(data: dict[str, Any], *arguments: str) -> str:
        scenario_file.write_text(json.dumps(data))
        command = [sys.executable, str(script), str(scenario_file), "--out", str(tmp_path / "out"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    assert "load.requests is missing" in call(good | {"load": {"lengths": {"length": 10}, "output_tokens": 4}})
    assert "--variants theirs: the scenario has ours" in call(good, "--variants", "theirs")
    assert "model.path ./gone is no folder" in call(good | {"model": {"path": "./gone"}})
