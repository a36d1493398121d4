"""The console script: what ends it, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_dwdp import cli

# A subcommand that holds something, as the demo holds its servers.
HOLDS = """
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from sglang_dwdp import cli

def run(args):
    try:
        print("running", flush=True)
        time.sleep(60)
    finally:
        Path(sys.argv[1]).write_text("gone")

signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background inherit that it is ignored
cli.parser = lambda: SimpleNamespace(parse_args=lambda argv: Namespace(run=run))
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_whatever_ends_it_a_subcommand_lets_go_of_what_it_holds(how: signal.Signals, code: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        os.kill(process.pid, how)
        assert process.wait(30) == code
    finally:
        process.kill()
    assert file.read_text() == "gone"


def test_what_a_user_can_mend_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--experts", "4", "--ranks", "5"]) == 1
    assert capsys.readouterr().err == (
        "sglang-dwdp: error: --experts 4 cannot be shared among --ranks 5: give at least as many\n"
    )


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_args: object) -> int:
        raise ModuleNotFoundError("No module named 'simpy'", name="simpy")

    parsed = SimpleNamespace(parse_args=lambda _argv: SimpleNamespace(run=run))
    monkeypatch.setattr(cli, "parser", lambda: parsed)
    assert cli.main([]) == 1
    assert capsys.readouterr().err == (
        "sglang-dwdp: error: simpy is not installed. Install what the planner needs: "
        "pip install 'sglang-dwdp[planner]'\n"
    )


def test_help_imports_nothing_large() -> None:
    """Nor anything that only an extra installs."""
    large = {"torch", "sglang", "transformers", *cli.PLANNER_MODULES}
    program = (
        f"import sys; from sglang_dwdp import cli; cli.parser().format_help(); print({large!r} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
