"""The command line: tables, JSON, figures, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_dwdp.cli import main

PLAN = ["plan", "gpt-oss-120b", "--gpu", "H200", "--num-gpus", "4"]
SCENARIO = """
defaults: {model: mixtral-8x7b, gpu: H200, group_size: 2, requests: 12, lengths: {length: 2000}}
scenarios: {DEP2: {mode: dep}, DWDP2: {mode: dwdp, copies: serial}, replicas: {mode: replica}}
"""


def test_plan_prints_tables_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PLAN) == 0
    out = capsys.readouterr().out
    for part in ("together", "Breakdown", "Memory per GPU", "--chunked-prefill-size", "DWDP4"):
        assert part in out


def test_a_plan_for_several_groups_names_their_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--group-size", "2"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("Set: "))  # unbroken, to be copied
    assert "--enable-dwdp --tp-size 4 --dwdp-group-size 2 --chunked-prefill-size" in line
    assert "--dwdp-local-experts 64 --dwdp-depth 2" in line


def test_balanced_experts_make_dep_wait_less(capsys: pytest.CaptureFixture[str]) -> None:
    speedups = []
    for extra in ([], ["--eplb"]):
        assert main([*PLAN, "--json", *extra]) == 0
        speedups.append([p["speedup_over_dep"] for p in json.loads(capsys.readouterr().out)["points"]])
    assert all(even < hot for hot, even in zip(*speedups, strict=True))


def test_plan_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["local_experts"] == 32
    assert data["verdict"].endswith(".")
    assert {"replica", "dep", "dwdp", "in-tree dwdp"} == set(data["memory_bytes"])
    for point in data["points"]:
        parts = point["dwdp"]["parts"]
        assert sum(parts.values()) == pytest.approx(point["dwdp"]["seconds"])
        assert point["dwdp"]["fetch_bytes"] > 0


def test_plan_takes_measured_figures_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, figure = tmp_path / "gpu.yaml", tmp_path / "plan.png"
    file.write_text("copy_bandwidth: 300.0e+9\npair_bandwidth: 300.0e+9\ncopy_interference: 0.2\n")
    command = ["plan", "qwen3-30b-a3b", "--gpu", "H100", "--num-gpus", "2", "--json", "--gpu-file", str(file)]
    assert main([*command, "--plot", str(figure)]) == 0
    found = json.loads(capsys.readouterr().out)
    first = found["points"][0]["dwdp"]
    assert first["fetch"] == pytest.approx(first["fetch_bytes"] / 300e9)
    assert first["parts"]["interference"] == pytest.approx(0.2 * first["fetch"])
    assert found["sources"]["copy_bandwidth"] == str(file)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nothing", "--gpu", "H200"], "neither a config.json nor a built-in"),
        (["plan", "mixtral", "--gpu", "Z80"], "unknown GPU"),
        (["plan", "mixtral", "--gpu", "H100", "--num-gpus", "8", "--group-size", "3"], "not a multiple"),
        (["plan", "mixtral", "--gpu", "H100", "--gpu-file", "none.yaml"], "cannot read GPU file none.yaml"),
        ([*PLAN, "--local-experts", "999"], "a rank stores 32 to 128"),
        ([*PLAN, "--length-ratio", "nan"], "ratio: "),
        ([*PLAN, "--weight-format", "fp3"], "unknown weight format"),
        ([*PLAN, "--plot", "nowhere/plan.png"], "cannot write nowhere/plan.png"),
        ([*PLAN, "--plot", "plan.xyz"], "ending in .pdf, .png, .svg"),
        (["simulate", "--scenario", "none.yaml", "--plot", "nowhere/s.png"], "cannot write nowhere/s.png"),
        (["simulate", "--scenario", "none.yaml"], "No such file"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--group-size", "--num-gpus", "--depth", "--tokens-per-rank"])
def test_counts_start_at_one(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit):
        main([*PLAN, option, "0"])
    assert f"{option}: must be at least 1, not 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("rich", PLAN),
        ("matplotlib", [*PLAN, "--json", "--plot", "plan.png"]),
        ("rich", ["simulate", "--scenario", "benchmarks/scenarios/scale_out.yaml"]),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, command: list[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(command) == 1
    message = f"{module} is not installed. Install what the planner needs: pip install 'sglang-dwdp[planner]'"
    assert capsys.readouterr().err == f"sglang-dwdp: error: {message}\n"


def test_a_plan_that_does_not_pay_does_not_say_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--tokens-per-rank", "600", "--local-experts", "32"]) == 0
    out = capsys.readouterr().out
    assert "\nSet:" not in out
    assert "To serve with DWDP nonetheless: --enable-dwdp --tp-size 4 --chunked-prefill-size 600" in out
    assert main(["plan", "qwen3-235b-a22b", "--gpu", "H100"]) == 0
    out = capsys.readouterr().out
    assert "does not fit: use DEP" in out
    assert "--enable-dwdp" not in out


def test_simulate_prints_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(SCENARIO)
    figure = tmp_path / "s.png"
    assert main(["simulate", "--scenario", str(file), "--plot", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "DWDP2" in out
    assert "TTFT" in out
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main(["simulate", "--scenario", str(file), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [d["scenario"] for d in data] == ["DEP2", "DWDP2", "replicas"]
    assert all(d["tokens"] == 12 * 2000 for d in data)


@pytest.mark.parametrize("module", ["plan", "simulate", "commands"])
def test_imports_are_light(module: str) -> None:
    code = (
        f"import sys, sglang_dwdp.planner.{module}\n"
        "heavy = {'torch', 'matplotlib', 'sglang', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
