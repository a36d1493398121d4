"""`sglang-dwdp demo`: DWDP on this machine's CPU, on real requests, against a server that holds all experts."""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sglang_dwdp.config import MIB
from sglang_dwdp.demo import workload
from sglang_dwdp.demo.checkpoint import make_checkpoint
from sglang_dwdp.demo.server import Server


@dataclass(frozen=True, slots=True)
class Answers:
    """What a server answered.

    Attributes:
        generated: `[ranks][prompts]`, tokens of `/generate`.
        chat: the text of a chat completion.
        frontend: the texts of a program that forks: both branches, and what follows after they joined.
        reports: the ranks' DWDP counters, in rank order; none of a single rank.
    """

    generated: list[list[list[int]]]
    chat: str
    frontend: tuple[str, str, str]
    reports: list[dict[str, Any]]


def run(args: Namespace) -> int:
    """Run the demo; 0 if all tokens agree and no collective was counted, otherwise 1."""
    console = Console()
    if args.out is not None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        return _run(args, console, Path(args.out))
    with tempfile.TemporaryDirectory(prefix="sglang-dwdp-demo-") as directory:
        return _run(args, console, Path(directory))


def _run(args: Namespace, console: Console, out: Path) -> int:
    model = out / "model"
    console.print(f"Making a random Qwen3-MoE checkpoint with {args.experts} experts, and training its tokenizer")
    # float32: in bfloat16 two tokens of a random model tie now and then, and a tie is decided by rounding.
    make_checkpoint(model, num_experts=args.experts, dtype=torch.float32)
    flags = ("--dtype", "float32")
    dwdp = Server(model, args.ranks, out / "dwdp.log", dwdp=("--dwdp-audit", "--dwdp-view", args.view), flags=flags)
    shared = _ask(dwdp, f"{args.ranks} ranks with DWDP", console)
    single = Server(model, 1, out / "single.log", flags=flags)
    reference = _ask(single, "one rank with all experts", console)
    console.print(_table(shared, reference))
    return 0 if _agree(shared, reference) else 1


def _ask(server: Server, name: str, console: Console) -> Answers:
    start = time.monotonic()
    with server, console.status(f"Starting {name}") as status:

        def show(stage: str) -> None:
            status.update(f"Starting {name}: {stage} ({time.monotonic() - start:.0f} s)")

        server.wait(progress=show)
        console.print(f"{name}: serving after {time.monotonic() - start:.0f} s")
        generated = []
        for rank in range(server.ranks):
            status.update(f"{name}: /generate on rank {rank}")
            generated.append(workload.generate(server, rank))
        status.update(f"{name}: /v1/chat/completions")
        chat = workload.chat(server)
        status.update(f"{name}: a frontend program that forks")
        frontend = workload.frontend(server)
        reports = server.reports() if server.ranks > 1 else []
        status.update(f"Stopping {name}")
    return Answers(generated, chat, frontend, reports)


def _agree(shared: Answers, reference: Answers) -> bool:
    return (
        all(tokens == reference.generated[0] for tokens in shared.generated)
        and (shared.chat, shared.frontend) == (reference.chat, reference.frontend)
        and not any(report["collectives"] for report in shared.reports)
    )


def _table(shared: Answers, reference: Answers) -> Table:
    table = Table(title="DWDP against one rank that holds all experts, greedy")
    # Narrow enough for a terminal of 80 columns.
    for heading in (
        "",
        "same\ntokens",
        "experts\nstored",
        "copied\nahead",
        "read in\nplace",
        "collectives\nin forwards",
    ):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for report, tokens in zip(shared.reports, shared.generated, strict=True):
        same = sum(a == b for a, b in zip(tokens, reference.generated[0], strict=True))
        table.add_row(
            f"rank {report['rank']} /generate",
            f"{same} of {len(tokens)}",
            f"{report['stored_bytes'] / MIB:.1f} MiB",
            f"{report['bytes_copied'] / MIB:.1f} MiB",
            f"{report['bytes_read_in_place'] / MIB:.1f} MiB",
            str(report["collectives"]),
        )
    table.add_row("chat completions", "yes" if shared.chat == reference.chat else "no")
    table.add_row("frontend, forked", "yes" if shared.frontend == reference.frontend else "no")
    return table
