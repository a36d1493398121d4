"""The console script `sglang-dwdp`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import get_args

from sglang_dwdp import __version__
from sglang_dwdp.config import ViewMode
from sglang_dwdp.errors import DwdpError
from sglang_dwdp.planner.commands import add_commands, at_least

# What `plan` and `simulate` import beyond what a server needs.
PLANNER_MODULES = ("matplotlib", "rich", "yaml")


def parser() -> argparse.ArgumentParser:
    """All subcommands; each sets `run`, a function from the parsed arguments to an exit code."""
    result = argparse.ArgumentParser(prog="sglang-dwdp", description="Distributed Weight Data Parallelism for SGLang")
    result.add_argument("--version", action="version", version=__version__)
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="serve a small MoE model with DWDP on this machine's CPU and compare it with a single rank"
    )
    demo.add_argument("--ranks", type=at_least(2), default=2, help="ranks in the group (default: 2)")
    demo.add_argument("--experts", type=at_least(4), default=8, help="experts of the model (default: 8)")
    demo.add_argument("--view", choices=get_args(ViewMode), default="auto", help="as --dwdp-view (default: auto)")
    demo.add_argument("--out", help="keep the model and the servers' logs in this folder")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="say whether this machine can serve with DWDP, and what to do if not")
    doctor.add_argument("--json", action="store_true", help="findings, and the facts behind them, as JSON")
    doctor.set_defaults(run=_doctor)
    timeline = commands.add_parser("timeline", help="draw compute and copy streams of a profile, and exposed copies")
    timeline.add_argument("profile", help="a trace of torch's profiler, as SGLang's /start_profile writes it")
    timeline.add_argument("-o", "--output", required=True, metavar="PICTURE", help="a .png, .pdf or .svg to write")
    timeline.add_argument("--gpu", type=int, metavar="N", help="one GPU of the profile (default: all)")
    timeline.add_argument(
        "--start-ms", type=float, default=0.0, metavar="MS", help="since the first kernel (default 0)"
    )
    timeline.add_argument("--end-ms", type=float, metavar="MS", help="since the first kernel (default: the end)")
    timeline.set_defaults(run=_timeline)
    add_commands(commands)
    return result


def _demo(args: argparse.Namespace) -> int:
    from sglang_dwdp.demo.demo import run  # imports torch

    if args.experts < args.ranks:
        raise DwdpError(f"--experts {args.experts} cannot be shared among --ranks {args.ranks}: give at least as many")
    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from sglang_dwdp.doctor.command import run  # imports torch, through the memory's modules

    return run(args)


def _timeline(args: argparse.Namespace) -> int:
    from sglang_dwdp.timeline.command import run

    return run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; an error that the user can mend is one line on stderr and exit code 1."""
    args = parser().parse_args(argv)
    # As an exception, so that servers and compilers that a subcommand started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return int(args.run(args))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in PLANNER_MODULES:
            raise
        sys.stderr.write(
            f"sglang-dwdp: error: {name} is not installed. Install what the planner needs: "
            "pip install 'sglang-dwdp[planner]'\n"
        )
        return 1
    except (DwdpError, OSError) as error:  # OSError: a file that cannot be read or written
        sys.stderr.write(f"sglang-dwdp: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
