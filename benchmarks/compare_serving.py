"""Servers under SGLang's own serving benchmark, side by side: python benchmarks/compare_serving.py SCENARIO.yaml

Starts the scenario's variants, compares their tokens with the reference's, and runs `sglang.benchmark.serving` at every
load. Writes into --out: results.json, report.html (all in one file), table.md, logs, and the benchmark's own JSON. A
variant that cannot start is reported with its error, and the others go on.

Exit code 0: all variants ran (and, where the scenario asks for it, all tokens are the reference's). 1: not so. 2: the
scenario cannot work, and nothing was started.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from benchmarks import checkpoints
from benchmarks.machine import machine
from benchmarks.serving.compare import Comparison, Result
from benchmarks.serving.report import html, markdown
from benchmarks.serving.scenario import ScenarioError, load_scenario


def main() -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", type=Path, help="YAML; see benchmarks/scenarios/serving")
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/serving/NAME)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--time-limit", type=float, default=1e9, metavar="SECONDS", help="nothing is begun after it")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()
    try:
        scenario = load_scenario(args.scenario)
        names = args.variants or list(scenario.variants)
        if unknown := set(names) - set(scenario.variants):
            raise ScenarioError(f"--variants {' '.join(unknown)}: the scenario has {', '.join(scenario.variants)}")
        folder = args.out or Path("out") / "serving" / scenario.name
        folder.mkdir(parents=True, exist_ok=True)
        model = scenario.model.path or checkpoints.make(scenario.model.make)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"compare_serving: error: {error}\n")
        return 2

    def say(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - begin:6.1f} s  {text}\n")
        sys.stdout.flush()

    about = {"scenario": msgspec.to_builtins(scenario), "machine": machine()}

    def save(result: Result) -> None:
        (folder / "results.json").write_text(json.dumps(about | result, indent=1) + "\n")
        (folder / "table.md").write_text(markdown(about | result))
        (folder / "report.html").write_text(html(about | result))

    comparison = Comparison(scenario, model, folder, save, say, begin + args.time_limit)
    try:
        comparison.run(names)
    except KeyboardInterrupt:
        sys.stderr.write("compare_serving: interrupted\n")
        return 130
    finally:
        save(comparison.result)
    sys.stdout.write(f"\n{markdown(about | comparison.result)}\n{folder / 'report.html'}\n")
    variants = comparison.result["variants"].values()
    different = scenario.same_tokens and any(variant.get("same_tokens") != 1 for variant in variants)
    return 1 if different or any("error" in variant for variant in variants) else 0


if __name__ == "__main__":
    sys.exit(main())
