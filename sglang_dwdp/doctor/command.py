"""`sglang-dwdp doctor`: findings as a table or as JSON."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_dwdp.doctor.examine import examine
from sglang_dwdp.doctor.findings import Finding, Status, findings, verdict

_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.ERROR: "bold red", Status.UNCHECKED: "dim"}


def run(args: Namespace) -> int:
    """Examine this machine and print what was found; 1 if something keeps servers from starting, otherwise 0."""
    facts = examine()
    found = findings(facts)
    if args.json:
        answer = {"verdict": verdict(facts, found), "findings": [asdict(one) for one in found], "facts": asdict(facts)}
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        console = Console()
        console.print(_table(found))
        console.print(f"[bold]{verdict(facts, found)}[/bold]", highlight=False)
    return int(any(one.status is Status.ERROR for one in found))


def _table(found: list[Finding]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for label in ("check", "", "found, what it means, and what to do"):
        table.add_column(label, vertical="top")
    for one in found:
        text = "\n".join(filter(None, (one.found, one.meaning, one.advice)))
        table.add_row(one.check, f"[{_STYLES[one.status]}]{one.status}[/]", escape(text))
    return table
