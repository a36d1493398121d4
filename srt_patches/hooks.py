"""Installs hooks, and makes sure that they are in place.

SGLang's registry logs a hook that could not be applied and goes on without it. A server that was asked for
DWDP must not, so every installation here is checked.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from sglang_dwdp.errors import DwdpRuntimeError

_SOURCE = HookSource("dwdp", "sglang-dwdp")


@dataclass(frozen=True, slots=True)
class Hook:
    """One hooked function or method of SGLang.

    Attributes:
        target: its dotted path.
        kind: how `function` is combined with it (see SGLang's HookType).
        function: called in its place, around, before or after it.
    """

    target: str
    kind: HookType
    function: Callable[..., Any]


def install(hooks: Sequence[Hook]) -> None:
    """Apply the `hooks` that are not in place yet, at once and in this order, and check all of them.

    Raises:
        DwdpRuntimeError: SGLang lacks a target, or cannot be hooked there.
    """
    failed = []
    for hook in hooks:
        try:
            if not _in_place(hook):
                # Not register() and apply_hooks(): those skip a target that another plugin hooked before, and
                # log an error where this has to be one.
                HookRegistry._apply_target(hook.target, [(hook.kind, hook.function, _SOURCE)])
            if not _in_place(hook):
                failed.append(f"{hook.target} (something else holds its place)")
        except Exception as error:  # noqa: BLE001  (a module of SGLang may fail to import in any way)
            failed.append(f"{hook.target} ({error})")
    if failed:
        raise DwdpRuntimeError(
            f"these parts of SGLang could not be hooked: {', '.join(failed)}. This SGLang is not one that "
            "sglang-dwdp supports (see srt_patches/ledger.md), or another plugin changed them: install "
            "a supported release, leave the other plugin out with SGLANG_PLUGINS, or serve without --enable-dwdp."
        )


def _in_place(hook: Hook) -> bool:
    return any(part is hook.function for layer in _layers(hook.target) for part in _captured(layer))


def _layers(target: str) -> Iterator[Any]:
    """The function at `target` and everything that it wraps."""
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return
    while function is not None:
        yield getattr(function, "__func__", function)
        function = getattr(function, "__wrapped__", None)


def _captured(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        yield cell.cell_contents
