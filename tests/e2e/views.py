"""One server that runs all forwards staged and then all direct: starting one takes longer than the prompts."""

from __future__ import annotations

from pathlib import Path

import requests

from sglang_dwdp.demo.server import Server
from tests.e2e.conftest import Answers
from tests.e2e.test_parity import compare

# Before each batch, a rank takes the view that a file names.
PLUGIN = """
import dataclasses
import os

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def switch(*_args, **_kwargs):
        from sglang_dwdp.srt_patches.forward import current_runtime
        with open(os.environ["VIEW_FILE"]) as file:
            view = file.read()
        runtime = current_runtime()
        if runtime.config.view != view:
            runtime.config = dataclasses.replace(runtime.config, view=view)
            runtime._views = runtime.config.views()

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", switch, HookType.BEFORE)
"""


class ViewFile:
    """The file by which a server with `PLUGIN` is told its view; `auto` at first.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.environment = {"VIEW_FILE": str(path)}
        self._path = path
        self.set("auto")

    def set(self, view: str) -> None:
        """From the next batch on. In one step: a rank may read the file meanwhile."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(view)
        partial.replace(self._path)


def check_staged_and_direct(server: Server, view: ViewFile, expected: Answers, limit: int) -> None:
    """Every rank gives the expected tokens with all forwards staged, and with all direct.

    Args:
        server: With `PLUGIN`, idle.
        view: Of that server; `auto` again in the end.
        expected: The tokens of `prompts.PROMPTS`.
        limit: Tokens of the largest forward that reads in place where the view is chosen by size.
    """
    found = [server.reports()]
    try:
        for name in ("staged", "direct"):
            # Else the second time most of each prompt would be in the cache of prefixes.
            requests.post(f"{server.url}/flush_cache", timeout=60).raise_for_status()
            view.set(name)
            compare(server, server.ranks, expected)
            found.append(server.reports())
    finally:
        view.set("auto")
    for first, staged, direct in zip(*found, strict=True):
        assert staged["direct_forwards"] == first["direct_forwards"]
        assert staged["staged_forwards"] > first["staged_forwards"]
        assert staged["bytes_copied"] > first["bytes_copied"]
        assert staged["direct_max_tokens"] == limit
        assert direct["staged_forwards"] == staged["staged_forwards"]
        assert direct["direct_forwards"] > staged["direct_forwards"]
        assert direct["bytes_read_in_place"] > staged["bytes_read_in_place"]
    line = f"in place in forwards of up to {limit} tokens"
    assert server.log.read_text(errors="replace").count(line) == server.ranks
