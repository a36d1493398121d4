"""Part d: where two lines cross, what the planner says of it, and the tables, targets and plot of part c and d."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.multi import crossover, show_servers
from benchmarks.multi.checkpoint import GPU_SHAPE
from benchmarks.serving.models import prepare
from benchmarks.serving.scenario import Model
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.plan import make_plan
from sglang_dwdp.planner.workload import Lengths

MODEL = "qwen3-30b-a3b"


def test_a_crossover_lies_on_the_line_between_two_points() -> None:
    points = [(1024, 0.5), (4096, 0.9), (8192, 1.1), (16384, 1.3)]
    assert crossover.crossover(points) == pytest.approx(math.sqrt(4096 * 8192))
    assert crossover.describe(points) == "5,793"
    assert crossover.worst_above(points, crossover.crossover(points)) == 1.1
    # The last time that it rises above 1 counts.
    assert crossover.crossover([(1024, 1.2), (4096, 0.9), (8192, 1.1)]) == pytest.approx(math.sqrt(4096 * 8192))
    assert crossover.crossover([(1024, 1.2), (4096, 1.0)]) == 1024
    assert crossover.describe([(1024, 1.2), (4096, 1.0)]) == "1,024 or less"
    assert crossover.crossover([(1024, 1.2), (4096, 0.99)]) is None
    assert crossover.describe([(1024, 1.2), (4096, 0.99)]) == "above 4,096"
    assert crossover.crossover([]) is None
    assert crossover.describe([]) == "not measured"
    assert crossover.worst_above(points, None) is None


def servers() -> dict[str, Any]:
    """What part c writes, with rates that are made up: ours overtakes expert parallelism at 4k tokens."""
    prefill = []
    for variation, bonus in ((0.0, 1.0), (0.2, 1.1)):
        for length, ratio in ((1024, 0.5), (4096, 1.0), (16384, 1.2)):
            rates = {"dwdp": 1e5 * ratio * bonus, "dep": 1e5, "in-tree": 9e4 * ratio * bonus, "replicas": 1.5e5}
            row = {"length": length, "variation": variation, "prompts": 4, "tokens_per_s": rates}
            prefill.append(row)
    decode = [
        {"sequences": count, "tokens_per_s": {"dwdp": 6e2 * count, "dep": 5e2 * count, "in-tree": 1e2 * count}}
        for count in (1, 8)
    ]
    same = {"answers": 16, "same_tokens": 16, "same_logprobs": 16, "largest_difference": 0.0, "ties": 0}
    compared = dict.fromkeys(("dwdp", "in-tree", "replicas"), same)
    return {
        "model": MODEL,
        "variants": {name: {"ready_s": 1.0} for name in ("dwdp", "in-tree", "dep", "replicas")}
        | {"deepep": {"error": "cannot run: why"}},
        "reference": "replicas",
        "tokens": compared | {"dep": same | {"same_tokens": 15, "same_logprobs": 3, "ties": 1}},
        "prefill": prefill,
        "decode": decode,
    }


def test_measured_and_planned_crossover_of_a_known_gpu() -> None:
    found = crossover.find(servers(), MODEL, "NVIDIA H100 80GB HBM3", 2)
    plain, varied = found["by_variation"]
    assert found["planner"] == "H100"
    assert plain["measured"] == pytest.approx(4096)
    assert 1024 < varied["measured"] < 4096
    assert plain["ratio_to_in_tree"] == [(tokens, pytest.approx(1 / 0.9)) for tokens in (1024, 4096, 16384)]
    assert len(plain["planned_ratio"]) == len(crossover.GRID)
    assert set(plain["planned_rates"]) == {"1024", "4096", "16384"}
    assert plain["planned_rates"]["16384"].keys() == {"dwdp", "dep", "in-tree", "replicas"}
    unknown = crossover.find(servers(), MODEL, "CPU", 2)
    assert unknown["planner"] is None
    assert "planned" not in unknown["by_variation"][0]
    assert crossover.find(servers(), MODEL, None, 2)["by_variation"][0]["measured"] == pytest.approx(4096)


def test_what_was_measured_counts_without_a_plan() -> None:
    found = crossover.find(servers(), "no such model", "NVIDIA H100 80GB HBM3", 2)
    assert "no such model" in found["planner_error"]
    assert found["by_variation"][0]["measured"] == pytest.approx(4096)
    assert "not planned" in shown(show_servers.crossover_table(found))


def test_the_planned_crossover_is_near_that_of_the_plan() -> None:
    """`sglang-dwdp plan` packs prompts of one length into chunks; here a forward has one prompt of the chunk's size."""
    from sglang_dwdp.planner.cost import Group
    from sglang_dwdp.planner.formats import default_precision, get_format
    from sglang_dwdp.planner.gpus import get_gpu
    from sglang_dwdp.planner.plan import Case

    model = load_model("qwen3-30b-a3b")
    case = Case(model, get_gpu("h100"), default_precision(get_format("bf16")), Lengths(length=8192))
    plan = make_plan(case, Group(4))
    ratios = crossover.Planned(MODEL, get_gpu("h100"), 4).ratios(0.0)
    assert plan.crossover is not None
    assert crossover.crossover(ratios) == pytest.approx(plan.crossover, rel=0.25)


def test_the_planner_reads_the_made_checkpoint(tmp_path: Path) -> None:
    small = {**GPU_SHAPE, "hidden_size": 64, "moe_intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
    path = prepare(Model(make=small | {"num_layers": 2, "head_dim": 32}), lambda _text: None, tmp_path)
    shape = load_model(path)
    assert (shape.experts, shape.top_k, shape.layers) == (128, 8, 2)
    assert len(list(Path(path).glob("*.safetensors"))) == GPU_SHAPE["num_files"]


def shown(*what: Any) -> str:
    with open("/dev/null", "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(*what)
    return console.export_text()


def test_tables_and_targets() -> None:
    result = servers()
    found = crossover.find(result, MODEL, "NVIDIA H100 80GB HBM3", 2)
    text = shown(show_servers.rate_table(result), show_servers.token_table(result), show_servers.crossover_table(found))
    for part in ("prefill 16,384 × 4 on a rank, lengths vary by 20%", "decode, 8 on a rank", "4,096", "H100"):
        assert part in text
    assert "deepep" not in text
    targets = {target.what.split(",")[0]: target for target in show_servers.server_targets(result, found)}
    assert targets["prefill to dep"].reached == pytest.approx(1.0)
    assert targets["prefill to dep"].verdict == "missed"
    assert targets["prefill to in-tree"].reached == pytest.approx(1 / 0.9)
    assert targets["prefill to in-tree"].verdict == "met"
    assert targets["decode to in-tree"].reached == pytest.approx(6)
    assert targets["share of answers with the same tokens"].reached == pytest.approx(15 / 16)
    del result["tokens"]["dep"]
    last = show_servers.server_targets(result, found)[-1]
    assert last.verdict == "not measured"


def test_without_expert_parallelism_nothing_is_claimed() -> None:
    result = servers()
    for row in (*result["prefill"], *result["decode"]):
        row["tokens_per_s"] = {"dwdp": row["tokens_per_s"]["dwdp"]}
    found = crossover.find(result, MODEL, "NVIDIA H100 80GB HBM3", 2)
    assert found["by_variation"][0]["measured_text"] == "not measured"
    assert [target.verdict for target in show_servers.server_targets(result, found)[:3]] == ["not measured"] * 3


def test_plot(tmp_path: Path) -> None:
    result = servers()
    found = crossover.find(result, MODEL, "NVIDIA H100 80GB HBM3", 2)
    assert show_servers.plot(result, found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    nothing = result | {"prefill": [], "decode": []}
    assert not show_servers.plot(nothing, crossover.find(nothing, MODEL, None, 2), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
