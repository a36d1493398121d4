"""The report of a comparison: a Markdown table, and one HTML file with bars that needs nothing beside it (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Row = Mapping[str, Any]
# Heading, key in SGLang's result, whether it is divided by the GPUs.
COLUMNS = (
    ("TTFT ms", "median_ttft_ms", False),
    ("TTFT p99", "p99_ttft_ms", False),
    ("TPOT ms", "median_tpot_ms", False),
    ("TPOT p99", "p99_tpot_ms", False),
    ("req/s", "request_throughput", False),
    ("out tok/s per GPU", "output_throughput", True),
    ("in+out tok/s per GPU", "total_throughput", True),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd } td:first-child { text-align: left }
td div { background: #4a7fb5; height: .35rem; border-radius: 2px } .note { color: #555 }
"""


def devices(scenario: Row, name: str) -> int:
    """What figures per GPU are divided by: GPUs, or on the CPU engine ranks."""
    if scenario["gpus"] == 1:
        return 1
    variant = scenario["variants"][name]
    ranks = 1 if variant["kind"] == "single" else scenario["ranks"]
    return int(ranks + (variant["decode"]["ranks"] if variant.get("decode") else 0))


def sheets(result: Row) -> dict[str, list[tuple[str, list[float | None]]]]:
    """By load: each variant's name, and its figures in the order of `COLUMNS`."""
    found: dict[str, list[tuple[str, list[float | None]]]] = {}
    for run in result["runs"]:
        gpus = devices(result["scenario"], run["variant"])
        figures = [run["benchmark"].get(key) for _, key, _ in COLUMNS]
        shown = [
            None if figure is None else figure / gpus if divided else figure
            for figure, (_, _, divided) in zip(figures, COLUMNS, strict=True)
        ]
        found.setdefault(run["load"], []).append((run["variant"], shown))
    return found


def notes(result: Row) -> list[str]:
    """What else there is to say of the variants: tokens, seconds to start, errors."""
    lines = []
    for name, variant in result["variants"].items():
        said = [f"started in {variant['start_s']} s"] if "start_s" in variant else []
        if "same_tokens" in variant:
            said.append(f"{variant['same_tokens']:.0%} of answers are those of {result['scenario']['reference']}")
        said += [variant["untuned"]] if variant.get("untuned") else []
        said += [f"error: {variant['error']}"] if "error" in variant else []
        lines.append(f"{name}: {'; '.join(said)}")
    return lines


def number(value: float | None) -> str:
    """With as many digits as matter."""
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def markdown(result: Row) -> str:
    """A table for each load, then the notes."""
    lines: list[str] = []
    for load, rows in sheets(result).items():
        lines += [f"| {load} | {' | '.join(heading for heading, _, _ in COLUMNS)} |"]
        lines += ["|---" * (len(COLUMNS) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(map(number, figures))} |" for name, figures in rows] + [""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(result))]) + "\n"


def html(result: Row) -> str:
    """The same as one page; bars are relative to the largest figure of a column."""
    scenario = result["scenario"]
    machine = "; ".join(f"{key}: {value}" for key, value in result["machine"].items())
    body = [f"<h1>{escape(scenario['name'])}</h1><p>{escape(scenario['description'])}</p>"]
    body += [f'<p class="note">{escape(machine)}. TTFT, TPOT and rates are SGLang\'s; without p99, medians.</p>']
    for load, rows in sheets(result).items():
        body += [f"<h2>{escape(load)}</h2><table><tr><th></th>"]
        body += [f"<th>{escape(heading)}</th>" for heading, _, _ in COLUMNS]
        body += ["</tr>", *(_html_row(name, figures, rows) for name, figures in rows), "</table>"]
    body += ["<h2>Variants</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes(result)), "</ul>"]
    head = f'<meta charset="utf-8"><title>{escape(scenario["name"])}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _html_row(name: str, figures: Sequence[float | None], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    cells = []
    for index, figure in enumerate(figures):
        largest = max((row[index] or 0.0 for _, row in rows), default=0.0)
        width = 100 * (figure or 0.0) / largest if largest else 0.0
        cells.append(f'<td>{number(figure)}<div style="width:{width:.0f}%"></div></td>')
    return f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>"
