"""Counters for Prometheus and for the log."""

from __future__ import annotations

import re

from sglang_dwdp.counters import METRICS, SETUP, WAITS, Growth, log_part, reported

REPORT = {key: 0 for metric in METRICS for key in metric.keys.values()}


def test_growth_since_the_last_look() -> None:
    growth = Growth()
    assert growth.take({"bytes_copied": 5, "view": "auto"}) == {"bytes_copied": 5}
    assert growth.take({"bytes_copied": 7, "late_fills": 1}) == {"bytes_copied": 2, "late_fills": 1}
    assert growth.take({"bytes_copied": 7, "late_fills": 1}) == {"bytes_copied": 0, "late_fills": 0}


def test_a_counter_that_was_reset_counts_from_0() -> None:
    growth = Growth()
    growth.take({"direct_forwards": 9})
    assert growth.take({"direct_forwards": 2}) == {"direct_forwards": 2}


def test_a_metric_needs_all_of_its_numbers() -> None:
    assert list(reported(REPORT)) == list(METRICS)
    without = {key: 0 for key in REPORT if key != "withdrawn_rounds"}
    assert {metric.name for metric in METRICS} - {metric.name for metric in reported(without)} == {"dwdp_rounds_total"}


def test_names_are_in_the_style_of_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len({*names, WAITS[0], SETUP[0]}) == len(names) + 2
    assert all(re.fullmatch(r"dwdp_[a-z_]+_total", name) for name in names)
    assert all(bool(metric.label) == (len(metric.keys) > 1) for metric in METRICS)


def test_the_part_of_a_log_line() -> None:
    grown = {"joint_forwards": 12.0, "direct_forwards": 3.0, "staged_forwards": 1.0, "exposed_copy_s": 0.00042}
    assert log_part(grown) == "dwdp: 12 joint, 3 direct, 1 staged, 0.4 ms waited"
    assert log_part({"late_fills": 2.0}) == "dwdp: 0 joint, 0 direct, 0 staged, 0.0 ms waited, 2 late fills"
