"""Every flag of the shipped scenarios is one that the installed SGLang takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.serving import launch
from benchmarks.serving.read import load_scenario
from tests import ROOT

SHIPPED = sorted((ROOT / "benchmarks" / "scenarios" / "serving").glob("*.yaml"))

PARSE = """
import argparse, json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(exit_on_error=False)
ServerArgs.add_cli_args(parser)
wrong = []
for name, argv in json.load(sys.stdin):
    try:
        _, unknown = parser.parse_known_args(argv)
        if unknown:
            wrong.append(f"{name}: {unknown}")
    except (argparse.ArgumentError, SystemExit) as error:
        wrong.append(f"{name}: {error}")
print("RESULT " + json.dumps(wrong))
"""


def test_sglang_takes_every_flag() -> None:
    commands = []
    for path in SHIPPED:
        scenario = load_scenario(path)
        for variant in scenario.variants:
            name = f"{path.stem}, {variant.name}"
            flags = [launch.server_flags(scenario, variant)]
            if variant.decode is not None:
                flags = [launch.prefill_flags(scenario, variant, 1), launch.decode_flags(scenario, variant)]
            commands += [(name, launch.server_command("model", 1, each)[3:]) for each in flags]
    commands.append(("must be found", ["--model-path", "model", "--no-such-flag", "1"]))
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(commands),
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    assert json.loads(lines[-1].removeprefix("RESULT ")) == ["must be found: ['--no-such-flag', '1']"]
