"""The entry point that SGLang calls in every one of its processes, before it parses arguments."""

from __future__ import annotations


def register() -> None:
    """Add the flags; everything else waits for a server that enables DWDP.

    SGLang swallows errors of a plugin. The flags are therefore added last: after an error before that,
    `--enable-dwdp` is an unknown argument, and no server comes up that ignores it.
    """
    from sglang_dwdp.srt_patches import arguments, hooks, install, resolve

    resolve.register_resolution()
    hooks.install((*install.HOOKS, *arguments.HOOKS))
    arguments.open_engine()
