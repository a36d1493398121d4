"""Servers under SGLang's own serving benchmark, side by side: python benchmarks/compare_serving.py SCENARIO.yaml

Starts each variant of the scenario in turn, waits until it answers, compares its tokens with the reference's, runs
`sglang.benchmark.serving` at every load point, and stops it. Writes into --out: results.json, report.html (all in
one file), table.txt, and a JSON file for each run. A variant that cannot start is reported with its error, and the
others go on. Called again after an interruption, it runs only what is missing.

Exit code 0: all variants ran (and, where the scenario asks for it, all tokens are equal). 1: not so. 2: the scenario
cannot work, and nothing was started.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.serving.compare import Deadline, compare, write_json
from benchmarks.serving.errors import ScenarioError
from benchmarks.serving.figures import same_tokens
from benchmarks.serving.models import prepare
from benchmarks.serving.ports import check_free
from benchmarks.serving.progress import Display
from benchmarks.serving.read import load_scenario
from benchmarks.serving.report import write_report
from benchmarks.serving.results import Results
from benchmarks.serving.scenario import Scenario, Variant
from benchmarks.serving.tables import failures, rich_table, sheets


def main() -> int:
    """Run the command; its exit code."""
    args = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 200)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        scenario = load_scenario(args.scenario)
        chosen = _chosen(scenario, args.variants)
        if scenario.port:
            check_free(scenario.port)
        deadline = Deadline(args.time_limit)
        results = Results(scenario, args.out or Path("out") / "serving" / scenario.name)
        if not args.report_only:
            model = prepare(scenario.model, console.print)
            with Display(console, len(chosen) * len(scenario.load.points())) as display:
                compare(scenario, chosen, model, results, display, deadline)
        return _finish(scenario, chosen, results, console)
    except (ScenarioError, OSError) as error:
        sys.stderr.write(f"compare_serving: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("compare_serving: interrupted; the same call goes on with what is missing\n")
        return 130


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", type=Path, help="YAML; see benchmarks/scenarios/serving")
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/serving/NAME)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--time-limit", type=float, default=0, metavar="SECONDS", help="after this, begin nothing new and report"
    )
    parser.add_argument("--report-only", action="store_true", help="run nothing; table and report of what --out holds")
    return parser.parse_args()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _chosen(scenario: Scenario, names: list[str] | None) -> list[Variant]:
    known = {variant.name: variant for variant in scenario.variants}
    for name in names or ():
        if name not in known:
            raise ScenarioError(f"--variants {name}: the scenario has {', '.join(known)}")
    return [variant for variant in scenario.variants if names is None or variant.name in names]


def _finish(scenario: Scenario, chosen: list[Variant], results: Results, console: Console) -> int:
    machines = results.machines() or [machine()]
    if len(machines) > 1:
        console.print("[yellow]these runs are of several machines or versions: do not compare them[/yellow]")
    found = machines[-1]
    with (results.folder / "table.txt").open("w") as file:
        for target in (console, Console(file=file, width=200)):
            for sheet in sheets(results):
                target.print(rich_table(sheet))
            for name, error in failures(results):
                target.print(f"{name} did not run: {error}", highlight=False, markup=False)
    console.print(f"{write_json(results, found)}\n{write_report(results, found)}", highlight=False)
    # What was not compared (NaN) is not equal either.
    different = [v.name for v in chosen if scenario.check.must_equal and not same_tokens(results, v) >= 1]
    if different:
        console.print(f"[red]tokens not those of {scenario.reference}: {', '.join(different)}[/red]")
    complete = all(results.complete(variant) and not results.error(variant) for variant in chosen)
    return 0 if complete and not different else 1


if __name__ == "__main__":
    sys.exit(main())
