"""`sglang-dwdp demo`: DWDP on this machine's CPU, on real requests, against a server that holds all experts."""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sglang_dwdp.config import MIB
from sglang_dwdp.demo.checkpoint import make_checkpoint
from sglang_dwdp.demo.server import Server

MAX_NEW_TOKENS = 16
_TEXT = " ".join(topics["class"].split())

# From a few tokens to several hundred: with --dwdp-view auto, short ones run on direct views and the long one's
# prefill on staged ones.
PROMPTS = ("The class statement", "A decorator is called with", _TEXT[:200], _TEXT[300:900], _TEXT[: 3 * 900])


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
    """Run the demo; 0 if all tokens agree, otherwise 1."""
    console, flags = Console(), ("--dtype", "float32")
    with ExitStack() as stack:
        out = Path(args.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="sglang-dwdp-demo-")))
        model = out / "model"
        console.print(f"Making a random Qwen3-MoE checkpoint with {args.experts} experts, and training its tokenizer")
        # float32: in bfloat16 two tokens of a random model tie now and then, and a tie is decided by rounding.
        make_checkpoint(model, num_experts=args.experts, dtype=torch.float32)
        dwdp = Server(model, args.ranks, out / "dwdp.log", dwdp=("--dwdp-audit", "--dwdp-view", args.view), flags=flags)
        shared = _ask(dwdp, f"{args.ranks} ranks with DWDP", console)
        single = Server(model, 1, out / "single.log", flags=flags)
        reference = _ask(single, "one rank with all experts", console)
    console.print(_table(shared, reference))
    return 0 if _agree(shared, reference) else 1


def _ask(server: Server, name: str, console: Console) -> Answers:
    start = time.monotonic()
    with server, console.status(f"Starting {name}; its log is {server.log}") as status:
        server.wait()
        console.print(f"{name}: serving after {time.monotonic() - start:.0f} s")
        status.update(f"{name}: /generate, /v1/chat/completions, and a frontend program that forks")
        generated = [
            [server.generate(prompt, MAX_NEW_TOKENS, rank) for prompt in PROMPTS] for rank in range(server.ranks)
        ]
        chat, frontend = _chat(server), _frontend(server)
        reports = server.reports() if server.ranks > 1 else []
        status.update(f"Stopping {name}")
    return Answers(generated, chat, frontend, reports)


def _chat(server: Server) -> str:
    """`/v1/chat/completions`: the answer's text."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What does the with statement do?"}],
        "temperature": 0,
        "max_tokens": MAX_NEW_TOKENS,
    }
    answer = server.post("/v1/chat/completions", body)
    text: str = answer["choices"][0]["message"]["content"]
    return text


def _frontend(server: Server) -> tuple[str, str, str]:
    """A frontend program that forks: both branches' texts, and what is generated after they joined."""
    import sglang as sgl

    @sgl.function
    def compare(s, first, second):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        s += "Two statements of the language. "
        forks = s.fork(2)
        for fork, word in zip(forks, (first, second), strict=True):
            fork += f"The {word} statement"
            fork += sgl.gen("text", max_tokens=MAX_NEW_TOKENS, temperature=0)
        s += f"One: {forks[0]['text']} Other: {forks[1]['text']} Both:"
        s += sgl.gen("both", max_tokens=MAX_NEW_TOKENS, temperature=0)
        s["first"], s["second"] = forks[0]["text"], forks[1]["text"]

    state = compare.run("while", "for", backend=sgl.RuntimeEndpoint(server.url))
    return state["first"], state["second"], state["both"]


def _agree(shared: Answers, reference: Answers) -> bool:
    return all(tokens == reference.generated[0] for tokens in shared.generated) and (shared.chat, shared.frontend) == (
        reference.chat,
        reference.frontend,
    )


def _table(shared: Answers, reference: Answers) -> Table:
    table = Table(title="DWDP against one rank that holds all experts, greedy")
    # Narrow enough for a terminal of 80 columns.
    table.add_column(no_wrap=True)
    for heading in ("same\ntokens", "experts\nstored", "copied\nahead", "read in\nplace"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report, tokens in zip(shared.reports, shared.generated, strict=True):
        same = sum(a == b for a, b in zip(tokens, reference.generated[0], strict=True))
        table.add_row(
            f"rank {report['rank']} /generate",
            f"{same} of {len(tokens)}",
            *(f"{report[name] / MIB:.1f} MiB" for name in ("stored_bytes", "bytes_copied", "bytes_read_in_place")),
        )
    table.add_row("chat completions", "yes" if shared.chat == reference.chat else "no")
    table.add_row("frontend, forked", "yes" if shared.frontend == reference.frontend else "no")
    return table
