"""The subcommands ``plan``, ``profile`` and ``simulate`` of ``sglang-dwdp``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace

from .builtin_models import BUILTIN_CONFIGS
from .checks import FIGURES, number, whole, writable
from .errors import PlannerError
from .formats import FORMATS
from .gpu import Gpu
from .gpus import GPUS
from .workload import KINDS, Lengths

WHOLE = ("num_gpus", "group_size", "local_experts", "depth", "tokens_per_rank", "length")


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommands; each sets ``run``: parsed arguments in, exit code out."""
    _add_plan(subparsers)
    _add_profile(subparsers)
    _add_simulate(subparsers)


def _add_plan(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = subparsers.add_parser("plan", help="will DWDP pay for this model on these GPUs?")
    plan.add_argument(
        "model", help=f"path of a config.json or of its folder, or a built-in shape: {', '.join(BUILTIN_CONFIGS)}"
    )
    plan.add_argument("--gpu", required=True, help=", ".join(g.name for g in GPUS.values()))
    plan.add_argument("--num-gpus", type=int, default=8, help="GPUs of the node (default 8)")
    plan.add_argument("--group-size", type=int, help="ranks that share one set of experts (default: all GPUs)")
    plan.add_argument("--weight-format", choices=sorted(FORMATS), help="of the experts (default: as shipped)")
    plan.add_argument(
        "--tokens-per-rank",
        type=int,
        metavar="N",
        help="of one forward, if you have decided; else the smallest within 5 %% of the best rate is recommended",
    )
    plan.add_argument(
        "--local-experts",
        type=int,
        metavar="N",
        help="experts per rank (default: the fewest whose copies are hidden, equal shares at least)",
    )
    plan.add_argument(
        "--depth",
        type=int,
        metavar="N",
        help="layers fetched ahead (default: the fewest, from 2 on, without loss)",
    )
    plan.add_argument("--length", type=int, default=8192, metavar="N", help="prompt length in tokens (default 8192)")
    plan.add_argument(
        "--length-kind",
        choices=KINDS,
        default="uniform",
        help="uniform: from --length-ratio times --length to --length; normal, lognormal: around it (default uniform)",
    )
    plan.add_argument("--length-ratio", type=float, default=0.8, metavar="R", help="of uniform lengths (default 0.8)")
    plan.add_argument("--length-std", type=float, default=0.0, metavar="N", help="in tokens (default 0)")
    plan.add_argument(
        "--exchange",
        choices=("all-gather", "all-to-all"),
        default="all-gather",
        help="DEP's exchange: SGLang's default all-gather, or an all-to-all backend",
    )
    plan.add_argument("--eplb", action="store_true", help="DEP balances its experts: no wait for hot ones")
    plan.add_argument("--profile", metavar="FILE", help="JSON written by `sglang-dwdp profile`")
    plan.add_argument(
        "--direct-read",
        type=float,
        metavar="GB/S",
        help="rate at which kernels read a peer's memory in place, if you have measured it (else the profile's, else "
        "computed from packet sizes)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument("--plot", metavar="FILE", help="write a figure (.png, .pdf or .svg)")
    plan.set_defaults(run=_run_plan)


def _add_profile(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    profile = subparsers.add_parser("profile", help="measure what the cost model needs on this machine's GPUs")
    profile.add_argument(
        "--model", default="qwen3-30b-a3b", help="shape to measure with, in bf16 (default qwen3-30b-a3b)"
    )
    profile.add_argument("--output", "-o", default="profile.json", metavar="FILE", help="default: profile.json")
    profile.add_argument("--quick", action="store_true", help="fewer sizes")
    profile.set_defaults(run=_run_profile)


def _add_simulate(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = subparsers.add_parser("simulate", help="simulate prefill serving request by request")
    simulate.add_argument("--scenario", required=True, metavar="FILE", help="YAML; see benchmarks/scenarios")
    simulate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    simulate.add_argument("--plot", metavar="FILE", help="write TTFT curves and a timeline (.png, .pdf or .svg)")
    simulate.set_defaults(run=_run_simulate)


def _emit(data: object) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def _run_plan(args: argparse.Namespace) -> int:
    from rich.console import Console

    from .compare import Case
    from .cost import Group
    from .formats import default_precision, get_format
    from .models import load_model
    from .plan import make_plan
    from .report import plan_json, plan_tables

    if args.plot is not None:
        writable(args.plot, FIGURES)
    given = {f"--{name.replace('_', '-')}": getattr(args, name) for name in WHOLE}
    for name, value in given.items():
        if value is not None:
            whole(name, value, least=1)
    model = load_model(args.model)
    size = args.group_size or args.num_gpus
    if args.num_gpus % size:
        raise PlannerError(f"--num-gpus {args.num_gpus} is not a multiple of --group-size {size}")
    precision = default_precision(get_format(args.weight_format or model.expert_format))
    lengths = Lengths(args.length_kind, args.length, args.length_ratio, args.length_std)
    case = Case(model, _gpu(args), precision, lengths, args.exchange)
    plan = make_plan(
        case,
        Group(size, args.local_experts or 0, depth=args.depth or 2),
        args.num_gpus,
        tokens=args.tokens_per_rank or 0,
        choose_local_experts=args.local_experts is None,
        choose_depth=args.depth is None,
    )
    if args.json:
        _emit(plan_json(plan))
    else:
        console = Console()
        console.print(plan_tables(plan))
        if plan.flags:
            label = "Set" if plan.pays else "To serve with DWDP nonetheless"
            console.print(f"{label}: " + " ".join(plan.flags), highlight=False, soft_wrap=True)
        console.print(f"[bold]{plan.verdict}[/bold]", highlight=False)
    if args.plot is not None:
        from .plots import plot_plan

        plot_plan(plan, args.plot)
    return 0


def _gpu(args: argparse.Namespace) -> Gpu:
    """The GPU, with what was measured on it or is given."""
    from .gpus import get_gpu
    from .profile import load_profile

    gpu = get_gpu(args.gpu)
    if args.profile is not None:
        gpu = load_profile(args.profile).apply(gpu)
    if args.direct_read is not None:
        rate = 1e9 * number("--direct-read", args.direct_read, positive=True)
        gpu = replace(gpu, direct_read=rate, sources={**gpu.sources, "direct_read": "given by --direct-read"})
    if args.eplb:
        gpu = replace(gpu, expert_skew=0.0)
    return gpu


def _run_profile(args: argparse.Namespace) -> int:
    from .measure import measure
    from .models import load_model
    from .report import profile_lines

    output = writable(args.output)  # before minutes of measuring
    profile = measure(load_model(args.model), quick=args.quick)
    output.write_text(json.dumps(profile.to_json(), indent=2) + "\n")
    sys.stdout.write("\n".join([*profile_lines(profile), f"wrote {output}"]) + "\n")
    return 0


def _run_simulate(args: argparse.Namespace) -> int:
    from rich.console import Console

    from .report import result_json, result_table
    from .scenario import load_scenarios
    from .simulate import simulate

    if args.plot is not None:
        writable(args.plot, FIGURES)
    started = time.perf_counter()
    results = [simulate(scenario) for scenario in load_scenarios(args.scenario)]
    if args.json:
        _emit([result_json(result) for result in results])
    else:
        console = Console()
        console.print(result_table(results))
        console.print(f"simulated in {time.perf_counter() - started:.1f} s")
    if args.plot is not None:
        from .plots import plot_results

        plot_results(results, args.plot)
    return 0
