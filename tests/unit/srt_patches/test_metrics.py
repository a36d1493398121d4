"""DWDP's metrics as prometheus_client exports them, and the queries of docs/grafana.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from prometheus_client.exposition import choose_encoder

from sglang_dwdp.counters import METRICS, RANKS, SETUP, WAITS
from sglang_dwdp.srt_patches import metrics
from tests import ROOT

LABELS = {"model_name": "m", "tp_rank": 1, "dp_rank": 1}


class Runtime:
    """A runtime with numbers that a test sets."""

    def __init__(self, *, audit: bool = True) -> None:
        self.config = SimpleNamespace(audit=audit)
        self.numbers = {key: 0 for metric in METRICS for key in metric.keys.values()} | {"setup_s": 1.5}
        self.waits: list[float] = []

    def report(self) -> dict[str, Any]:
        return dict(self.numbers)

    def take_waits(self) -> list[float]:
        waits, self.waits = self.waits, []
        return waits


class Collector:
    """What of SGLang's collector is used, with a registry of its own."""

    def __init__(self) -> None:
        self.labels = LABELS
        self.registry = prometheus_client.CollectorRegistry()
        self._counter_cls, self._gauge_cls, self._histogram_cls = (
            partial(kind, registry=self.registry)
            for kind in (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
        )

    def value(self, name: str, **own: str) -> float | None:
        labels = {name: str(value) for name, value in LABELS.items()}
        return self.registry.get_sample_value(f"sglang:{name}", labels | own)

    def samples(self) -> Iterator[Any]:
        return (sample for family in self.registry.collect() for sample in family.samples)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(metrics, "current_runtime", lambda: made)
    return made


def test_counters_grow_with_the_reports(runtime: Runtime) -> None:
    collector = Collector()
    metrics.publish(None, collector, max_total_num_tokens=1)  # as `emit_constants`
    assert collector.value("dwdp_forwards_total", kind="staged") == 0  # there from the start
    assert collector.value("dwdp_setup_seconds") == 1.5
    for staged, waited_us in ((2, 500_000), (5, 1_500_000), (5, 1_500_000)):
        runtime.numbers |= {"staged_forwards": staged, "round_wait_us": waited_us}
        metrics.publish(None, collector, object())  # as `log_stats`
    assert collector.value("dwdp_forwards_total", kind="staged") == 5
    assert collector.value("dwdp_forwards_total", kind="direct") == 0
    assert collector.value("dwdp_round_wait_seconds_total") == pytest.approx(1.5)


def test_each_wait_is_observed_once(runtime: Runtime) -> None:
    collector = Collector()
    for waits in ([0.0, 0.003], [], [0.2]):
        runtime.waits = waits
        metrics.publish(None, collector)
    assert collector.value("dwdp_copy_wait_seconds_count") == 3
    assert collector.value("dwdp_copy_wait_seconds_sum") == pytest.approx(0.203)
    assert collector.value("dwdp_copy_wait_seconds_bucket", le="0.005") == 2


def test_what_nobody_counts_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, collector = Runtime(audit=False), Collector()
    del runtime.numbers["joint_rounds"]  # exchange steps are off
    monkeypatch.setattr(metrics, "current_runtime", lambda: runtime)
    metrics.publish(None, collector)
    names = {sample.name for sample in collector.samples()}
    assert "sglang:dwdp_copied_bytes_total" in names
    assert not {"sglang:dwdp_read_in_place_bytes_total", "sglang:dwdp_rounds_total"} & names


def test_a_line_of_the_log_gets_one_more_part(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_logged", metrics.Growth())
    runtime.numbers["direct_forwards"] = 4
    first, second = metrics.add_part(["#token: 1"], None), metrics.add_part(["#token: 1"], None)
    assert first == ["#token: 1", "dwdp: 0 joint, 4 direct, 0 staged, 0.0 ms waited"]
    assert second == ["#token: 1", "dwdp: 0 joint, 0 direct, 0 staged, 0.0 ms waited"]


# What Prometheus 2 and 3 accept; to the former, prometheus_client writes names without colons.
ACCEPTED = (
    "application/openmetrics-text;version=1.0.0",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8",
)


@pytest.mark.parametrize("accepted", ACCEPTED)
def test_the_dashboard_asks_for_what_is_exported(runtime: Runtime, accepted: str) -> None:
    collector = Collector()
    metrics.publish(None, collector)
    # The launcher's own, which no rank exports: see test_rank_watch.py.
    collector._gauge_cls(f"sglang:{RANKS[0]}", RANKS[1], ["model_name", "condition"]).labels("m", "lost")
    encode, _ = choose_encoder(accepted)
    samples = re.findall(r"^([\w:]+)\{(.*)\}", encode(collector.registry).decode(), re.MULTILINE)
    labels = {name: {*re.findall(r'(\w+)="', values)} for name, values in samples}
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set()
    for target in targets:
        [pattern] = re.findall(r'__name__=~"([^"]+)"', target["expr"])
        [name] = [name for name in labels if re.fullmatch(pattern, name)]
        asked.add(name.removeprefix("sglang")[1:])
        wanted = re.findall(r"by \((\w+)\)", target["expr"]) + re.findall(r",(\w+)=~", target["expr"])
        assert {*wanted, *re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} <= labels[name], target
        assert target["expr"].count("(") == target["expr"].count(")")
    assert asked >= {metric.name for metric in METRICS} - {"dwdp_read_in_place_bytes_total"}
    [query] = [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    [pattern] = re.findall(r'__name__=~"([^"]+)"', query)
    assert any(re.fullmatch(pattern, name) for name in labels)


def test_documented_names_are_exported() -> None:
    documented = re.findall(r"`sglang:(dwdp_\w+)", (ROOT / "docs" / "usage.md").read_text())
    assert {*documented} <= {metric.name for metric in METRICS} | {WAITS[0], SETUP[0], RANKS[0]}
    assert len(documented) > 2
