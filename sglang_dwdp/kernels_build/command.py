"""The subcommand `sglang-dwdp build-kernels`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sglang_dwdp.kernels_build.formats import ARCHITECTURES, FORMATS, check_architecture

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_dwdp.kernels_build.build import Compiled


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand; it sets `run`: parsed arguments in, exit code out."""
    command = subparsers.add_parser(
        "build-kernels",
        help="build what one weight format needs of FlashInfer's fused MoE for Hopper; no GPU is needed",
        description="Build what one weight format needs of FlashInfer's fused MoE for Hopper, into FlashInfer's "
        "cache. A server with DWDP uses it where FlashInfer's full module is not installed or built. No GPU is needed.",
    )
    command.add_argument("--format", required=True, choices=sorted(FORMATS), help="of the expert weights")
    command.add_argument("--arch", default=ARCHITECTURES[0], help=f"compute capability (default: {ARCHITECTURES[0]})")
    command.add_argument("--jobs", type=_positive, help="compilers at a time (default: by processors and memory)")
    command.add_argument("--list", action="store_true", help="print the sources and the library, and build nothing")
    command.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Build, with a bar that counts sources, and a table of what took longest."""
    check_architecture(args.arch)
    import torch
    from rich.console import Console

    from sglang_dwdp.kernels_build import toolchain
    from sglang_dwdp.kernels_build.build import Build, default_jobs
    from sglang_dwdp.kernels_build.recipe import building_for, recipe

    tools = toolchain.find(torch.version.cuda)
    console = Console()
    with building_for(args.arch, tools):
        plan = recipe(FORMATS[args.format], args.arch, tools)
    if args.list:
        for step in plan.steps:
            console.print(str(step.source), soft_wrap=True, highlight=False)
        console.print(str(plan.library), soft_wrap=True, highlight=False)
        return 0
    jobs = args.jobs or default_jobs()
    console.print(
        f"{plan.name}: {len(plan.steps)} of the {plan.full_sources} sources of FlashInfer {plan.flashinfer}'s full "
        f"module, nvcc {tools.cuda_version}, {jobs} at a time",
        highlight=False,
    )
    start = time.perf_counter()
    compiled = _with_progress(console, plan.name, len(plan.steps), lambda done: Build(plan, tools, jobs, done).run())
    _print_longest(console, compiled)
    cpu_s = sum(one.cpu_s for one in compiled if not one.reused)
    size = plan.library.stat().st_size / (1 << 20)
    console.print(
        f"built {plan.library} ({size:.1f} MiB) in {time.perf_counter() - start:.0f} s, {cpu_s:.0f} s of processor "
        f"time, {sum(one.reused for one in compiled)} of {len(compiled)} sources reused",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _with_progress(
    console: Console, title: str, total: int, work: Callable[[Callable[[Compiled], None]], list[Compiled]]
) -> list[Compiled]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, last="")

        def done(one: Compiled) -> None:
            progress.update(task, advance=1, last=one.source)
            if not console.is_terminal:  # a log gets a line for each source instead of a bar
                console.print(f"{one.source}: {'reused' if one.reused else f'{one.cpu_s:.0f} s'}", highlight=False)

        return work(done)


def _print_longest(console: Console, compiled: Sequence[Compiled]) -> None:
    from rich.table import Table

    table = Table("source", "processor time", "peak memory", title="The longest")
    for one in sorted(compiled, key=lambda one: -one.cpu_s)[:5]:
        table.add_row(one.source, f"{one.cpu_s:.0f} s", f"{one.peak_bytes / (1 << 30):.1f} GiB")
    console.print(table)
