"""The tables of kept serving comparisons as Markdown: python benchmarks/serving_table.py [--queues] RESULTS.json …

RESULTS.json is what compare_serving.py wrote. --queues adds every rank's requests over time. --keep FILE writes what is
worth keeping of one of them: no paths of the machine, and no figure for each request.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

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


def kept(data: dict[str, Any]) -> dict[str, Any]:
    """The record without commands, the logs' places, generated tokens, and lists of one entry for each request."""

    def without_log(error: str | None) -> str | None:
        return error and re.sub(r" \(log: [^)]*\)", "", error)

    def of_run(run: dict[str, Any]) -> dict[str, Any]:
        figures = {name: value for name, value in run["benchmark"].items() if not isinstance(value, list)}
        return {name: value for name, value in run.items() if name != "command"} | {"benchmark": figures}

    variants = {
        name: {key: value for key, value in variant.items() if key != "tokens"}
        | {"runs": {key: of_run(run) for key, run in variant["runs"].items() if run}}
        | {"error": without_log(variant["error"])}
        for name, variant in data["variants"].items()
    }
    return data | {"variants": variants}


def main() -> None:
    """Print the tables of each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of a comparison")
    parser.add_argument("--queues", action="store_true", help="also every rank's requests over time")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write the one RESULTS.json there, without paths")
    args = parser.parse_args()
    if args.keep and len(args.results) > 1:
        parser.error("--keep takes one RESULTS.json")
    try:
        text = "\n\n".join(tables(path, args.queues) for path in args.results)
        if args.keep:
            args.keep.write_text(json.dumps(kept(json.loads(args.results[0].read_text())), indent=1) + "\n")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"RESULTS.json has to be what compare_serving.py wrote: {error!r}")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
