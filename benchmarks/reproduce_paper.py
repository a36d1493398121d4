"""Set the planner and the simulator beside what others have published, with the errors.

    python benchmarks/reproduce_paper.py [--json FILE]

`paper_tables.py` has the figures; this prints them and writes them down.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.paper_tables import ablation, context_server, mi355x, roofline, table_1, table_2


def main() -> None:
    """Print all tables, whatever the errors, which are the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/reproduce_paper.json"), metavar="FILE")
    args = parser.parse_args()
    console = Console(width=120)
    rows = [*table_1(), *table_2(), *roofline(), *ablation(), *context_server(), *mi355x()]
    lines = []
    for title in dict.fromkeys(row.table for row in rows):
        table = Table("case", "published", "planned", "error", "limit", "holds", title=title, title_justify="left")
        figures = {}
        for row in (row for row in rows if row.table == title):
            limit = "-" if row.limit is None else f"{row.limit:g} {row.unit}"
            cells = f"{row.published:.4g}", f"{row.planned:.4g}", f"{row.error:+.2f} {row.unit}", limit
            table.add_row(row.case, *cells, {None: "-", True: "yes", False: "no"}[row.holds])
            figures[row.case] = [row.published, float(f"{row.planned:.6g}")]
        console.print(table)
        lines.append(f" {json.dumps(title)}: {json.dumps(figures)}")
    judged = [row.holds for row in rows if row.holds is not None]
    console.print(f"{sum(judged)} of {len(judged)} figures within their limits")
    args.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
