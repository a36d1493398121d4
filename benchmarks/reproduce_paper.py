"""Set the planner and the simulator beside what others have published, with the errors.

    python benchmarks/reproduce_paper.py [--json FILE] [--requests N]

``paper_tables.py`` has the figures, theirs and ours; this prints them and writes them down.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.paper_tables import Row, ablation, context_server, mi355x, roofline, table_1, table_2

NOTES = (
    "P Table 3: with 256 requests in flight TTFT and TPS/GPU are tied (Little's law), and the published pairs are "
    "not: a share z of the time outside TTFT would have to differ from row to row.",
    "AMD, 32,768 tokens per rank, 8K: the published 17.7 s of DWDP exceed the 16.6 s that the same server took for "
    "twice the tokens. They equal one prompt per forward and more; SGLang's rule for 16,384 tokens packs two.",
)


def _number(value: float, digits: int) -> str:
    return f"{value:,.1f}" if value > 10 else f"{value:.{digits}f}"


def _print_table(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("case", min_width=36)
    for label in ("theirs", "ours", "error", "limit", "holds"):
        table.add_column(label, justify="right")
    for row in rows:
        unit = "pt" if row.kind == "points" else "%"
        limit = "-" if row.limit is None else f"{row.limit:g} {unit}"
        holds = {None: "-", True: "yes", False: "[red]no[/red]"}[row.holds]
        digits = 5 if "Table 2" in title else 3
        figures = (_number(row.theirs, digits), _number(row.ours, digits))
        table.add_row(row.case, *figures, f"{row.error:+.2f} {unit}", limit, holds)
    console.print(table)


def main() -> int:
    """Print all tables; exit code 0 whatever the errors, which are the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="benchmarks/results/reproduce_paper.json", metavar="FILE")
    parser.add_argument("--requests", type=int, default=4096, help="per simulated server (theirs: 4,096)")
    args = parser.parse_args()
    if args.requests < 1:
        parser.error(f"--requests {args.requests}: at least one is needed")
    console = Console(width=120)
    rows = [*table_1(), *table_2(), *roofline(), *ablation(args.requests), *context_server(args.requests), *mi355x()]
    by_table: dict[str, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    for title, members in by_table.items():
        _print_table(console, title, members)
    judged = [row for row in rows if row.holds is not None]
    console.print(f"{sum(bool(row.holds) for row in judged)} of {len(judged)} figures within their limits")
    for note in NOTES:
        console.print("- " + note)
    target = Path(args.json)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = {title: {row.case: [row.theirs, float(f"{row.ours:.6g}")] for row in by_table[title]} for title in by_table}
    lines = (f" {json.dumps(title)}: {json.dumps(figures)}" for title, figures in data.items())
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
