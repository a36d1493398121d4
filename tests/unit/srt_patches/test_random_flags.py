"""Some random sets of flags; `python -m tests.fixtures.random_flags 1000` tries more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_each_set_resolves_or_ends_with_one_line() -> None:
    command = [sys.executable, "-m", "tests.fixtures.random_flags", "40", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "'resolved'" in done.stdout
    assert "'one line'" in done.stdout
