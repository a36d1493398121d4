"""The tables of kept serving comparisons as Markdown: python benchmarks/serving_table.py [--queues] RESULTS.json …

RESULTS.json is what compare_serving.py wrote. --queues adds every rank's requests over time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.serving.figures import from_record
from benchmarks.serving.queues import lines_of
from benchmarks.serving.tables import Heading, markdown, sheets_of


def tables(path: Path, queues: bool) -> str:
    """All tables of one file, then the variants that did not run, then the queues."""
    data = json.loads(path.read_text())
    found = [
        markdown(sheet) for sheet in sheets_of(Heading(**data["heading"]), list(map(from_record, data["figures"])))
    ]
    variants = data["variants"].items()
    found += [f"{name} did not run: {variant['error']}" for name, variant in variants if variant["error"]]
    runs = [(name, key, run) for name, variant in variants for key, run in variant["runs"].items() if run]
    if queues:
        found += ["\n".join((f"{name}, {key}", *lines_of(run["queues"]))) for name, key, run in runs]
    return "\n\n".join(found)


def main() -> None:
    """Print the tables of each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of a comparison")
    parser.add_argument("--queues", action="store_true", help="also every rank's requests over time")
    args = parser.parse_args()
    sys.stdout.write("\n\n".join(tables(path, args.queues) for path in args.results) + "\n")


if __name__ == "__main__":
    main()
