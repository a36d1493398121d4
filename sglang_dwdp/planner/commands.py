"""The subcommands `plan`, `kernels` and `simulate` of `sglang-dwdp`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# option, default, help
_COUNTS = (
    ("--num-gpus", 8, "GPUs of the node (default 8)"),
    ("--group-size", None, "ranks that share one set of experts (default: all GPUs)"),
    ("--tokens-per-rank", 0, "of one forward (default: the smallest within 5 %% of the best rate)"),
    ("--local-experts", None, "experts per rank (default: the fewest whose copies are hidden, equal shares at least)"),
    ("--depth", 2, "layers fetched ahead (default 2)"),
    ("--length", 8192, "longest prompt in tokens (default 8192)"),
)


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommands; each sets `run`: parsed arguments in, exit code out."""
    plan = subparsers.add_parser("plan", help="will DWDP pay for this model on these GPUs?")
    add = plan.add_argument
    add("model", help="path of a config.json or of its folder, or a built-in model; an unknown name lists them")
    add("--gpu", required=True, help="H100, H200, B200, GB200, MI355X, or a driver's name of one of them")
    add("--gpu-file", metavar="FILE", help="YAML or JSON: measured figures in place of the GPU's (docs/planner.md)")
    for option, default, text in _COUNTS:
        add(option, type=at_least(1), default=default, metavar="N", help=text)
    add("--length-ratio", type=float, default=0.8, metavar="R", help="the shortest prompt's part of it (default 0.8)")
    add("--weight-format", help="of the experts (default: as shipped)")
    exchanges = ("all-gather", "all-to-all")
    add("--exchange", choices=exchanges, default=exchanges[0], help="DEP's: SGLang's default, or an all-to-all backend")
    add("--eplb", action="store_true", help="DEP balances its experts: no wait for hot ones")
    plan.set_defaults(run=_run_plan)
    kernels = subparsers.add_parser("kernels", help="Triton configurations for experts that SGLang has none tuned for")
    kernels.add_argument("model", help="as of plan")
    kernels.add_argument("--gpu", required=True, help="as of plan")
    kernels.add_argument("--group-size", type=at_least(1), required=True, metavar="N", help="ranks that share experts")
    kernels.add_argument("--out", required=True, metavar="FOLDER", help="to be made, for SGLANG_MOE_CONFIG_DIR")
    kernels.set_defaults(run=_run_kernels)
    simulate = subparsers.add_parser("simulate", help="simulate prefill serving request by request")
    simulate.add_argument("--scenario", required=True, metavar="FILE", help="YAML; see benchmarks/scenarios")
    simulate.set_defaults(run=_run_simulate)
    for parser in (plan, simulate):
        parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
        parser.add_argument("--plot", metavar="FILE", help="write a figure (.png, .pdf or .svg)")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


def _emit(data: object) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def _run_plan(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_dwdp.planner.checks import PlannerError
    from sglang_dwdp.planner.cost import Group
    from sglang_dwdp.planner.formats import default_precision, get_format
    from sglang_dwdp.planner.gpus import get_gpu, with_file
    from sglang_dwdp.planner.models import load_model
    from sglang_dwdp.planner.plan import Case, make_plan
    from sglang_dwdp.planner.plots import check_figure, plot_plan
    from sglang_dwdp.planner.report import plan_json, plan_tables
    from sglang_dwdp.planner.tuned import sglang_folder, untuned_notes
    from sglang_dwdp.planner.workload import Lengths

    if args.plot is not None:
        check_figure(args.plot)
    model = load_model(args.model)
    gpu = get_gpu(args.gpu)
    if args.gpu_file is not None:
        gpu = with_file(gpu, args.gpu_file)
    if args.eplb:
        gpu = replace(gpu, expert_skew=0.0)
    size = args.group_size or args.num_gpus
    if args.num_gpus % size:
        raise PlannerError(f"--num-gpus {args.num_gpus} is not a multiple of --group-size {size}")
    lengths = Lengths("uniform", length=args.length, ratio=args.length_ratio)
    precision = default_precision(get_format(args.weight_format or model.expert_format))
    plan = make_plan(
        Case(model, gpu, precision, lengths, args.exchange),
        Group(size, args.local_experts or 0, depth=args.depth),
        args.num_gpus,
        tokens=args.tokens_per_rank,
        choose_local_experts=args.local_experts is None,
    )
    notes = untuned_notes(model, gpu, precision.experts.name, plan.group, sglang_folder())
    if args.json:
        _emit(plan_json(plan) | {"untuned": notes})
    else:
        console = Console()
        console.print(plan_tables(plan))
        if plan.flags:
            label = "Set" if plan.pays else "To serve with DWDP nonetheless"
            console.print(f"{label}: " + " ".join(plan.flags), highlight=False, soft_wrap=True)
        console.print(f"[bold]{plan.verdict}[/bold]", highlight=False)
        for note in notes:
            console.print(note, highlight=False)
    if args.plot is not None:
        plot_plan(plan, args.plot)
    return 0


def _run_kernels(args: argparse.Namespace) -> int:
    from sglang_dwdp.planner.checks import PlannerError
    from sglang_dwdp.planner.gpus import get_gpu
    from sglang_dwdp.planner.models import load_model
    from sglang_dwdp.planner.tables import write_tables
    from sglang_dwdp.planner.tuned import sglang_folder

    sglang = sglang_folder()
    if sglang is None:
        raise PlannerError("SGLang is not installed here, whose tables are needed")
    out = Path(args.out).absolute()
    for name in write_tables(load_model(args.model), get_gpu(args.gpu), args.group_size, sglang, out):
        sys.stdout.write(f"added {name}\n")
    sys.stdout.write(f"export SGLANG_MOE_CONFIG_DIR={out}\n")
    return 0


def _run_simulate(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sglang_dwdp.planner.plots import check_figure, plot_results
    from sglang_dwdp.planner.report import result_json, result_table
    from sglang_dwdp.planner.scenario import load_scenarios
    from sglang_dwdp.planner.simulate import simulate

    if args.plot is not None:
        check_figure(args.plot)
    started = time.perf_counter()
    results = [simulate(scenario) for scenario in load_scenarios(args.scenario)]
    if args.json:
        _emit([result_json(result) for result in results])
    else:
        console = Console()
        console.print(result_table(results))
        console.print(f"simulated in {time.perf_counter() - started:.1f} s")
    if args.plot is not None:
        plot_results(results, args.plot)
    return 0
