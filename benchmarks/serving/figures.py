"""The figures of a comparison: from records to rows (pure)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.results import Results
from benchmarks.serving.scenario import Point, Variant
from benchmarks.serving.tokens import share_equal, share_same_text

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Row:
    """One variant at one load point. Times in ms, rates in tokens per second.

    per_device: output tokens per second and GPU.  total_per_device: input and output.  same_tokens: share of the
    sampled requests with the reference's tokens.  same_text: the same of the benchmark's answers, under load.
    exposed_copy: share of the run's duration, mean over ranks, that compute waited for copies of experts (NaN
    without DWDP).  peak_queue: `[ranks]`, the most requests on each rank.
    """

    variant: str
    point: Point
    ttft: float
    ttft_p99: float
    tpot: float
    tpot_p99: float
    input_rate: float
    output_rate: float
    per_device: float
    total_per_device: float
    same_tokens: float
    same_text: float
    exposed_copy: float
    peak_queue: tuple[int, ...]


def rows(results: Results, point: Point) -> list[Row]:
    """A row for each variant that ran at `point`, in the scenario's order."""
    found = ((variant, results.run(variant, point)) for variant in results.scenario.variants)
    return [_row(results, variant, point, record) for variant, record in found if record is not None]


def all_rows(results: Results) -> list[Row]:
    """The rows of all load points, in their order."""
    return [row for point in results.scenario.load.points() for row in rows(results, point)]


def as_record(row: Row) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    found = dataclasses.asdict(row)
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in found.items()}


def from_record(record: dict[str, Any]) -> Row:
    """What `as_record` was made from."""
    found: dict[str, Any] = {key: NAN if value is None else value for key, value in record.items()}
    found |= {"point": Point(**record["point"]), "peak_queue": tuple(record["peak_queue"])}
    return Row(**found)


def same_tokens(results: Results, variant: Variant) -> float:
    """Share of the sampled requests that got the reference's tokens; NaN where one of both was not asked."""
    by_name = {v.name: v for v in results.scenario.variants}
    mine, right = results.tokens(variant), results.tokens(by_name[results.scenario.reference])
    return share_equal(mine["tokens"], right["tokens"]) if mine and right else NAN


def _row(results: Results, variant: Variant, point: Point, record: dict[str, Any]) -> Row:
    data = record["benchmark"]
    by_name = {v.name: v for v in results.scenario.variants}
    right = results.run(by_name[results.scenario.reference], point)
    devices = results.scenario.devices(variant)
    reports = record.get("dwdp") or []
    exposed = [report["exposed_copy_s"] for report in reports if "exposed_copy_s" in report]
    return Row(
        variant=variant.name,
        point=point,
        ttft=data["median_ttft_ms"],
        ttft_p99=data["p99_ttft_ms"],
        tpot=data["median_tpot_ms"],
        tpot_p99=data["p99_tpot_ms"],
        input_rate=data["input_throughput"],
        output_rate=data["output_throughput"],
        per_device=data["output_throughput"] / devices,
        total_per_device=(data["input_throughput"] + data["output_throughput"]) / devices,
        same_tokens=same_tokens(results, variant),
        same_text=share_same_text(data["text_hashes"], right["benchmark"]["text_hashes"]) if right else NAN,
        exposed_copy=sum(exposed) / len(exposed) / data["duration"] if exposed else NAN,
        peak_queue=tuple(record["peak_queue"]),
    )


def ratio(mine: float, other: float) -> float:
    """NaN where the other figure is 0 or missing."""
    return mine / other if other else NAN
