"""Comparisons with fake servers in real processes, and a fake benchmark; requests, and the report."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.processes import RunError
from benchmarks.serving import compare, servers
from benchmarks.serving.compare import Comparison, condensed
from benchmarks.serving.load import bursty_lengths, checked_prompts, dataset_options, long_to_one_rank, write_bursty
from benchmarks.serving.report import html, markdown
from benchmarks.serving.scenario import Bursty, Load, Model, Scenario, ServedVariant

SERVER = """
import http.server, json, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.reply({"internal_states": [{"dwdp": {"rank": rank, "late_fills": 0}} for rank in (1, 0)]})
    def do_POST(self):
        length = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input_ids"])
        self.reply({"output_ids": [length, int(sys.argv[2])]})
    def log_message(self, *_): pass
if int(sys.argv[2]) == 9: sys.exit("RuntimeError: no such model")
if int(sys.argv[2]) == 2: print("Using default MoE kernel config. Not at /a/E=64,N=768,device_name=X.json", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
FIGURES = {"total_throughput": 100.0, "median_ttft_ms": 50.0, "request_throughput": 2.0, "ttfts": [1, 2]}


class Benchmark:
    """What takes the place of SGLang's: it has written its result when it is started."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log, self.started = log, time.monotonic()
        Path(arguments[arguments.index("--output-file") + 1]).write_text(json.dumps(FIGURES))

    def exit_code(self) -> int:
        return 0

    def stop(self) -> None:
        pass


@pytest.fixture
def scenario(monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """Variants whose flag `token` is the second token of each answer; 9 does not start."""

    def server_command(_model: str, port: int, flags: dict[str, Any]) -> list[str]:
        return [sys.executable, "-c", SERVER, str(port), str(flags["token"])]

    monkeypatch.setattr(servers, "server_command", server_command)
    monkeypatch.setattr(compare, "Client", Benchmark)
    monkeypatch.setattr(compare, "preload", lambda: None)
    monkeypatch.setattr(servers, "_POLL_S", 0.05)
    return Scenario(
        name="fake",
        model=Model(path="m"),
        gpus=0,
        loads={"x": Load(input_tokens=8, output_tokens=4, requests=2, rates=[2], in_flight=[4])},
        variants={
            "dwdp": ServedVariant(kind="dwdp", flags={"token": 1}),
            "other": ServedVariant(kind="dwdp", flags={"token": 2}),
            "broken": ServedVariant(kind="dwdp", flags={"token": 9}),
            "dep": ServedVariant(kind="replicas", flags={"token": 1}),
        },
        reference="dep",
        together=2,
        start_timeout_s=20,
        run_timeout_s=20,
    )


def run(scenario: Scenario, folder: Path, end: float = 1e9) -> dict[str, Any]:
    comparison = Comparison(scenario, "m", folder, lambda _: None, lambda _: None, end)
    return comparison.run(list(scenario.variants))


def test_variants_are_compared_and_failures_reported(scenario: Scenario, tmp_path: Path) -> None:
    result = run(scenario, tmp_path)
    variants = result["variants"]
    assert next(iter(variants)) == "dep"  # the reference is first, so that there is something to compare with
    assert {name: found.get("same_tokens") for name, found in variants.items()} == {
        "dep": 1.0,
        "dwdp": 1.0,
        "other": 0.0,
        "broken": None,
    }
    assert "broken ended with exit code 1: RuntimeError: no such model" in variants["broken"]["error"]
    loads = [(one["load"], one["variant"]) for one in result["runs"]]
    assert loads[:2] == [("x, 2 req/s", "dep"), ("x, 2 req/s", "dwdp")]
    assert loads[2:4] == [("x, 4 in flight", "dep"), ("x, 4 in flight", "dwdp")]
    assert result["runs"][0]["benchmark"]["total_throughput"] == 100.0
    assert result["runs"][1]["dwdp"] == [{"late_fills": 0}] * 2

    about = {"machine": {"torch": "2"}, "scenario": {"name": "<fake>", "description": "", "gpus": 2, "ranks": 2}}
    about["scenario"] |= {"reference": "dep", "variants": {name: {"kind": "dwdp"} for name in variants}}
    table, page = markdown(about | result), html(about | result)
    assert "| dwdp | 50.0 | – | – | – | 2.0 | – | 50.0 |" in table  # per GPU
    assert "- other: started in" in table
    assert "0% of answers are those of dep; no tuned Triton configuration for E=64,N=768" in table
    assert table.count("no tuned") == 1
    assert "&lt;fake&gt;" in page
    assert "no such model" in page


def test_nothing_starts_beside_a_server_that_times_forwards(scenario: Scenario, tmp_path: Path) -> None:
    exchange = ServedVariant(kind="dwdp-exchange", flags={"token": 1})
    scenario = msgspec.structs.replace(scenario, variants={"dep": scenario.variants["dep"], "exchange": exchange})
    said: list[str] = []
    ready = servers.Deployment.wait

    def wait(deployment: servers.Deployment, timeout_s: float) -> float:
        said.append("waited")
        return ready(deployment, timeout_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers.Deployment, "wait", wait)
        result = Comparison(scenario, "m", tmp_path, lambda _: None, said.append, 1e9).run(["dep", "exchange"])
    assert said[:3] == ["starting exchange", "waited", "starting dep"]
    assert [one["variant"] for one in result["runs"][:2]] == ["dep", "exchange"]
    assert result["variants"]["exchange"]["same_tokens"] == 1.0


def test_nothing_is_begun_when_the_time_is_over(scenario: Scenario, tmp_path: Path) -> None:
    result = run(scenario, tmp_path, end=time.monotonic() - 1)
    assert {found["error"] for found in result["variants"].values()} == {"no time left"}


def test_failed_requests_are_an_error() -> None:
    assert condensed({"errors": ["", ""], "completed": 2}) == {"completed": 2}
    with pytest.raises(RunError, match="1 of 2 requests failed, the first with: ValueError: x"):
        condensed({"errors": ["", "Traceback\nValueError: x"]})


def test_options_of_the_benchmark() -> None:
    load = Load(input_tokens=4096, output_tokens=64, ratio=0.8, requests=2, rates=[1.5], in_flight=[3])
    options = " ".join(dataset_options(load, None))
    assert "--dataset-name random-ids" in options
    assert "--random-range-ratio 0.8" in options
    assert load.points() == [
        ("1.5 req/s", ["--request-rate", "1.5"]),
        ("3 in flight", ["--request-rate", "inf", "--max-concurrency", "3"]),
    ]
    assert [len(prompt) for prompt in checked_prompts(load)] == [1024, 2048, 3072, 4096]


def test_bursty_lengths_are_long_for_one_rank(tmp_path: Path) -> None:
    bursty = Bursty(mean=2500, std=4000, limit=15000)
    lengths = bursty_lengths(bursty, 400, 2, seed=1)
    assert lengths == bursty_lengths(bursty, 400, 2, seed=1)
    assert max(lengths) <= 15000
    assert min(lengths[::2]) >= max(lengths[1::2])
    assert sum(lengths) / 400 == pytest.approx(2500, rel=0.3)
    ordered = long_to_one_rank([1, 2, 3, 4, 5], 2, np.random.default_rng(0))
    assert sorted(ordered[::2]) == [3, 4, 5]

    class Letters:
        def encode(self, text: str) -> list[int]:
            return list(text.encode("latin-1", "replace"))

        def decode(self, tokens: list[int]) -> str:
            return bytes(tokens).decode("latin-1")

    load = Load(bursty=bursty, output_tokens=5, requests=10, rates=[1])
    write_bursty(load, 2, Letters(), tmp_path / "f")
    sent = [json.loads(line) for line in (tmp_path / "f").read_text().splitlines()]
    assert [len(one["messages"][0]["content"]) for one in sent] == bursty_lengths(bursty, 10, 2, seed=1)
    assert {one["max_tokens"] for one in sent} == {5}
