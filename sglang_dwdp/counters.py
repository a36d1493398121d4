"""The runtime's counters, their names in Prometheus, by how much they grew, and a line of the log about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Report = Mapping[str, int | float | str]

# Name and help of the metrics that are not counters.
WAITS = ("dwdp_copy_wait_seconds", "Waits of the compute stream for copies: a sample on a GPU, all on a CPU.")
WAIT_BUCKETS_S = (1e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 1.0)
SETUP = ("dwdp_setup_seconds", "How long sharing the experts took at start-up.")
RANKS = ("dwdp_ranks", "Ranks of the server by their condition: serving, not responding, lost.")


@dataclass(slots=True)
class ForwardCounts:
    """What the forwards of a rank did; with `--dwdp-audit`, also the remote bytes that they read in place."""

    direct_forwards: int = 0
    staged_forwards: int = 0
    joint_forwards: int = 0
    forward_tokens: int = 0
    exchanged_rows: int = 0
    bytes_read_in_place: int = 0


@dataclass(frozen=True, slots=True)
class Metric:
    """A counter of Prometheus.

    Attributes:
        name: Its name, without a prefix.
        help: What it counts.
        keys: What of `DwdpRuntime.report` it shows: one key, or those of several values of `label`, by value.
        label: The label that tells several keys apart; empty for one key.
        unit: What one of the report's number is in the metric's unit.
    """

    name: str
    help: str
    keys: Mapping[str, str]
    label: str = ""
    unit: float = 1.0


def _one(name: str, key: str, text: str, unit: float = 1.0) -> Metric:
    return Metric(name, text, {"": key}, unit=unit)


METRICS = (
    Metric(
        "dwdp_forwards_total",
        "Forwards by how they got remote experts: read in place, copied ahead, or run jointly in an exchange step.",
        {"direct": "direct_forwards", "staged": "staged_forwards", "joint": "joint_forwards"},
        "kind",
    ),
    _one("dwdp_forward_tokens_total", "forward_tokens", "Tokens of all forwards."),
    _one("dwdp_copied_bytes_total", "bytes_copied", "Bytes of remote experts copied into slots."),
    _one("dwdp_read_in_place_bytes_total", "bytes_read_in_place", "Bytes read in place (with --dwdp-audit)."),
    _one("dwdp_late_fills_total", "late_fills", "Layers whose experts were not copied ahead."),
    _one("dwdp_exposed_copy_seconds_total", "exposed_copy_s", "Seconds that the compute stream waited for copies."),
    Metric(
        "dwdp_rounds_total",
        "Small forwards by how the ranks' meeting ended: joint, helped with no rows, alone, or alone after a wait.",
        {name: f"{name}_rounds" for name in ("joint", "helped", "alone", "withdrawn")},
        "outcome",
    ),
    _one("dwdp_round_wait_seconds_total", "round_wait_us", "Seconds waited for peers before small forwards.", 1e-6),
    _one("dwdp_exchanged_rows_total", "exchanged_rows", "This rank's rows in joint forwards."),
    _one("dwdp_helped_rows_total", "helped_rows", "Peers' rows in joint forwards that this rank joined idle."),
)


def reported(report: Report) -> Iterator[Metric]:
    """The metrics that this rank's report has all numbers for; without exchange steps, it has none of rounds."""
    return (metric for metric in METRICS if report.keys() >= set(metric.keys.values()))


class Growth:
    """By how much a rank's counters grew since they were looked at last."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def take(self, report: Report) -> dict[str, float]:
        """The growth of each counter of `METRICS` in `report`, by its key there.

        A counter that is smaller than before has started anew, from 0.
        """
        grown = {}
        for metric in METRICS:
            for key in metric.keys.values():
                if key in report:
                    value, seen = float(report[key]), self._seen.get(key, 0.0)
                    grown[key] = value - seen if value >= seen else value
                    self._seen[key] = value
        return grown


def log_part(grown: Mapping[str, float]) -> str:
    """Growth in words, for a line of the log."""
    kinds = ", ".join(f"{grown.get(f'{kind}_forwards', 0):.0f} {kind}" for kind in ("joint", "direct", "staged"))
    late = f", {grown['late_fills']:.0f} late fills" if grown.get("late_fills") else ""
    return f"dwdp: {kinds}, {1000 * grown.get('exposed_copy_s', 0):.1f} ms waited{late}"
