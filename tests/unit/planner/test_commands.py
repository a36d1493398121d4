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
    for part in ("exposed", "Breakdown", "Memory per GPU", "--chunked-prefill-size", "DWDP4"):
        assert part in out


def test_a_plan_for_several_groups_names_their_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--group-size", "2"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("Set: "))  # whole, to be copied
    assert "--enable-dwdp --tp-size 4 --dwdp-group-size 2 --chunked-prefill-size" in line
    assert "--dwdp-local-experts 64 --dwdp-depth 2 --dwdp-direct-max-tokens" in line


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


def test_plan_takes_a_profile_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "plan.png"
    profile = "benchmarks/results/profile_h100.json"
    command = ["plan", "qwen3-30b-a3b", "--gpu", "H100", "--num-gpus", "4", "--profile", profile]
    assert main([*command, "--plot", str(figure)]) == 0
    capsys.readouterr()
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nothing", "--gpu", "H200"], "neither a config.json nor a built-in"),
        (["plan", "mixtral", "--gpu", "Z80"], "unknown GPU"),
        (["plan", "mixtral", "--gpu", "H100", "--num-gpus", "8", "--group-size", "3"], "not a multiple"),
        (["plan", "mixtral", "--gpu", "H100", "--profile", "none.json"], "does not exist"),
        ([*PLAN, "--group-size", "0"], "--group-size must be at least 1, not 0"),
        ([*PLAN, "--num-gpus", "0"], "--num-gpus must be at least 1, not 0"),
        ([*PLAN, "--depth", "0"], "--depth must be at least 1, not 0"),
        ([*PLAN, "--local-experts", "999"], "a rank stores 32 to 128"),
        ([*PLAN, "--tokens-per-rank", "-1"], "--tokens-per-rank must be at least 1"),
        ([*PLAN, "--length-std", "nan"], "std must be a finite number"),
        ([*PLAN, "--direct-read", "0"], "--direct-read must be positive"),
        ([*PLAN, "--plot", "nowhere/plan.png"], "nowhere is not a directory"),
        ([*PLAN, "--plot", "plan.xyz"], "ends in .pdf, .png, .svg"),
        (["simulate", "--scenario", "none.yaml", "--plot", "nowhere/s.png"], "nowhere is not a directory"),
        (["simulate", "--scenario", "none.yaml"], "does not exist"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_plan_takes_what_two_gpus_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Copy rates and interference between two GPUs, and reads in place: by the profile, or as given."""
    profile = json.loads(Path("benchmarks/results/profile_h100.json").read_text())
    copy = {"alone": 390e9, "under_compute": 300e9, "compute_slowdown": 1.25}
    profile["copies"] = [{"device": 0, "peer": 1, **copy}, {"device": 1, "peer": 0, **copy}]
    read = {"rows_per_expert": 4, "bytes_per_second": 200e9}
    profile["reads"] = [{"device": 0, "peer": 1, **read}, {"device": 1, "peer": 0, **read}]
    file = tmp_path / "two.json"
    file.write_text(json.dumps(profile))
    command = ["plan", "qwen3-30b-a3b", "--gpu", "H100", "--num-gpus", "2", "--json", "--profile", str(file)]
    found = {}
    for name, extra in {"measured": [], "faster": ["--direct-read", "400"]}.items():
        assert main([*command, *extra]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    first = found["measured"]["points"][0]["dwdp"]
    assert first["fetch_seconds"] == pytest.approx(first["fetch_bytes"] / 300e9)
    assert first["parts"]["interference"] == pytest.approx(0.2 * first["fetch_seconds"])
    sources = found["measured"]["sources"]
    for name in ("copy_bandwidth", "pair_bandwidth", "copy_interference", "direct_read"):
        assert sources[name] == "measured on NVIDIA H100 80GB HBM3"
    assert found["faster"]["sources"]["direct_read"] == "given by --direct-read"
    assert found["measured"]["direct_max_tokens"] < found["faster"]["direct_max_tokens"]


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


def test_profile_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["profile", "-o", str(tmp_path / "p.json")]) == 1
    assert "no GPU is visible" in capsys.readouterr().err
    assert main(["profile", "-o", str(tmp_path / "missing" / "p.json")]) == 1
    assert "is not a directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["direct", "plan", "cost", "commands", "profile", "scenario"])
def test_imports_are_light(module: str) -> None:
    """The runtime asks for direct_max_tokens: no torch, no matplotlib, no simulator behind it."""
    code = (
        f"import sys, sglang_dwdp.planner.{module}\n"
        "heavy = {'torch', 'matplotlib', 'simpy', 'sglang', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
