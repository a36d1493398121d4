"""How a server is told to use DWDP: command-line flags, --config files and keywords of `sglang.Engine`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp import config as options
from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.cpu import engine as cpu_engine
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches.attached import attach_config
from sglang_dwdp.srt_patches.hooks import Hook

_FROM_COMMAND_LINE = "_dwdp_from_command_line"


def add_flags(_result: None, parser: argparse.ArgumentParser) -> None:
    """After `ServerArgs.add_cli_args`; --config files are merged with what this parser knows."""
    options.add_flags(parser)


def attach_flags(server_args: Any, _cls: type, args: argparse.Namespace) -> Any:
    """After `ServerArgs.from_cli_args`, which drops what is not a field."""
    setattr(server_args, _FROM_COMMAND_LINE, True)
    with errors_in_one_line(server_args):
        attach(server_args, options.from_options(vars(args)))
    return server_args


def attach(server_args: Any, config: DwdpConfig | None) -> None:
    """Enable DWDP for a server that these arguments will start; None: do not."""
    if config is None:
        return
    attach_config(server_args, config)
    if cpu_engine.needed(server_args.device):
        # Before SGLang imports anything that asks what the CPU engine may use.
        cpu_engine.arrange(server_args.tp_size)


def engine_server_args(**keywords: Any) -> Any:
    """What `sglang.Engine` builds its server arguments with: ServerArgs, and the options of DWDP beside them."""
    from sglang.srt.server_args import ServerArgs

    given = {name: keywords.pop(name) for name in options.option_names() if name in keywords}
    server_args = ServerArgs(**keywords)
    attach(server_args, options.from_options(given))
    return server_args


def open_engine(_result: None = None) -> None:
    """Let `sglang.Engine` take the options as keywords, through the class attribute that it has for forks.

    Runs after every `load_plugins`, which `Engine.__init__` calls first thing, because the engine's module is
    imported late and is too heavy to be imported for this.
    """
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None and hasattr(engine, "Engine"):
        engine.Engine.server_args_class = staticmethod(engine_server_args)


@contextmanager
def errors_in_one_line(server_args: Any) -> Iterator[None]:
    """Where these arguments came from a command line, end the program with one line instead of a traceback."""
    try:
        yield
    except DwdpConfigError as error:
        if not getattr(server_args, _FROM_COMMAND_LINE, False):
            raise
        sys.stderr.write(f"sglang-dwdp: error: {error}\n")
        raise SystemExit(2) from None


HOOKS = (
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", HookType.AFTER, attach_flags),
    Hook("sglang.srt.plugins.load_plugins", HookType.AFTER, open_engine),
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", HookType.AFTER, add_flags),  # the last one: see plugin.py
)
