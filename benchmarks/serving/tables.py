"""The tables of a comparison, for the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.serving.figures import Row, all_rows, ratio
from benchmarks.serving.results import Results
from benchmarks.serving.scenario import Point, Scenario


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table as text: a title, the headings, and rows of as many cells."""

    title: str
    headings: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Heading:
    """What a comparison's tables say beside the rows: its name, what figures are divided by, whose tokens are right."""

    name: str
    device: str
    reference: str


def sheets(results: Results) -> list[Sheet]:
    """Two tables for each load point: the figures, and every variant against every other."""
    return sheets_of(heading(results.scenario), all_rows(results))


def heading(scenario: Scenario) -> Heading:
    """Of a scenario's tables."""
    return Heading(scenario.name, "rank" if scenario.cpu else "GPU", scenario.reference)


def sheets_of(what: Heading, found: Sequence[Row]) -> list[Sheet]:
    """The tables of rows, in the order of their load points."""
    tables: list[Sheet] = []
    for point in dict.fromkeys(row.point for row in found):
        done = [row for row in found if row.point == point]
        tables.append(_figures(what, point, done))
        if len(done) > 1:
            tables.append(_ratios(point, done))
    return tables


def _figures(what: Heading, point: Point, done: list[Row]) -> Sheet:
    headings = ["", "TTFT ms", "p99", "TPOT ms", "p99", "in tok/s", "out tok/s"]
    headings += [f"out/{what.device}", f"in+out/{what.device}"]
    headings += [f"same tokens as {what.reference}", "same text under load", "copies waited for"]
    headings += ["most requests on a rank"]
    lines = [
        [
            row.variant,
            *(number(value) for value in (row.ttft, row.ttft_p99, row.tpot, row.tpot_p99)),
            *(number(value) for value in (row.input_rate, row.output_rate, row.per_device, row.total_per_device)),
            *(percent(value) for value in (row.same_tokens, row.same_text, row.exposed_copy)),
            " ".join(map(str, row.peak_queue)),
        ]
        for row in done
    ]
    return Sheet(f"{what.name}, {point.label}", headings, lines)


def _ratios(point: Point, done: list[Row]) -> Sheet:
    lines = [
        [
            row.variant,
            *(
                "–"
                if row is other
                else f"{ratio(row.total_per_device, other.total_per_device):.2f} / {ratio(row.ttft, other.ttft):.2f} / "
                f"{ratio(row.ttft_p99, other.ttft_p99):.2f} / {ratio(row.tpot, other.tpot):.2f}"
                for other in done
            ),
        ]
        for row in done
    ]
    title = f"{point.label}: ratio of tok/s per device / TTFT / p99 TTFT / TPOT, to"
    return Sheet(title, ["", *(row.variant for row in done)], lines)


def failures(results: Results) -> list[tuple[str, str]]:
    """(variant, error) of those that did not run to their end."""
    found = ((variant.name, results.error(variant)) for variant in results.scenario.variants)
    return [(name, error) for name, error in found if error]


def rich_table(sheet: Sheet) -> Table:
    """A sheet for the terminal."""
    table = Table(title=sheet.title, title_justify="left")
    for heading in sheet.headings:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for line in sheet.rows:
        table.add_row(*line)
    return table


def markdown(sheet: Sheet) -> str:
    """A sheet for a document."""
    lines = [sheet.headings, ["---", *["---:"] * (len(sheet.headings) - 1)], *sheet.rows]
    return "\n".join((f"**{sheet.title}**", "", *(f"| {' | '.join(cells)} |" for cells in lines)))


def number(value: float) -> str:
    """With as many digits as say something."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    """A share."""
    return "–" if math.isnan(value) else f"{value:.1%}" if 0 < value < 0.995 else f"{value:.0%}"
