"""Tables of `moe_layer.py`'s results: for a terminal, and for docs/kernels.md. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

BEGIN, END = "<!-- moe layer: begin -->", "<!-- moe layer: end -->"
BOUND, BOUND_TOKENS = 0.02, 8192  # what views may cost over resident experts
Row = Mapping[str, Any]


def over(row: Row) -> float:
    """What a view costs over resident experts, as a part of 1."""
    return float(row["view_ms"] / row["resident_ms"] - 1)


def verdicts(rows: Iterable[Row]) -> list[str]:
    """For each kernel at the largest forward, whether a view costs no more than it may."""
    return [
        f"{row['model']} {row['format']}, {row['kernel']}: {100 * over(row):+.1f} % at {row['tokens']} tokens, "
        f"{'met' if over(row) <= BOUND else 'MISSED'} (at most {100 * BOUND:.0f} %)"
        for row in rows
        if row.get("tokens") == BOUND_TOKENS and "view_ms" in row
    ]


def fastest(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, str]]:
    """By model and format, by tokens: the kernel that is fastest on a view."""
    result: dict[tuple[str, str], dict[int, str]] = {}
    for row in sorted((row for row in rows if "view_ms" in row), key=lambda row: -float(row["view_ms"])):
        result.setdefault((row["model"], row["format"]), {})[row["tokens"]] = row["kernel"]
    return {key: dict(sorted(by_tokens.items())) for key, by_tokens in sorted(result.items())}


def for_terminal(rows: Iterable[Row]) -> Table:
    """Every row."""
    table = Table("model", "format", "kernel", "tokens", "resident ms", "view ms", "view over resident")
    for row in rows:
        if "view_ms" not in row:
            table.add_row(row["model"], row["format"], row["kernel"], str(row.get("tokens", "")), row["error"][:70])
            continue
        times = (f"{row['resident_ms']:.3f}", f"{row['view_ms']:.3f}", f"{100 * over(row):+.1f} %")
        table.add_row(row["model"], row["format"], row["kernel"], str(row["tokens"]), *times)
    return table


def for_docs(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line for each kernel, one column for each number of tokens, "view (over resident)"."""
    rows = [row for result in results for row in result["rows"]]
    tokens = sorted({row["tokens"] for row in rows if "tokens" in row})
    gpus = sorted({f"{one['gpu']}, FlashInfer {one['flashinfer']}, SGLang {one['sglang']}" for one in results})
    lines = [f"Measured on {'; '.join(gpus)}: milliseconds on a view, in brackets what that is over resident experts"]
    lines[0] += "."
    lines += ["", "| model | experts | kernel | " + " | ".join(f"{count} tokens" for count in tokens) + " |"]
    lines.append("|---" * (3 + len(tokens)) + "|")
    best = fastest(rows)
    for model, weights, kernel in dict.fromkeys((row["model"], row["format"], row["kernel"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["format"], row["kernel"]) == (model, weights, kernel)]
        cells = []
        for count in tokens:
            row = next((row for row in mine if row.get("tokens") == count), None)
            if row is None or "view_ms" not in row:
                said = row or next((row for row in mine if "error" in row), None)
                cells.append("–" if said is None else said["error"].split("\n")[0][:60].replace("|", "/"))
                continue
            shown = f"{row['view_ms']:.3f} ({100 * over(row):+.1f} %)"
            cells.append(f"**{shown}**" if best[model, weights].get(count) == kernel else shown)
        lines.append(f"| {model} | {weights} | {kernel} | " + " | ".join(cells) + " |")
    lines += ["", "Bold: the fastest on views. At 8,192 tokens, against at most 2 % over resident experts:", ""]
    lines += [f"- {verdict}" for verdict in verdicts(rows)]
    return "\n".join(lines)


def insert(page: Path, text: str) -> None:
    """Put `text` between the page's marks.

    Raises:
        ValueError: the page has no such marks.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
