"""All ranks of a server on one GPU: for proving tokens and host overhead where there is no second one.

NCCL refuses two ranks on one GPU, so they talk through gloo. Their "link" is the GPU's own memory, several times
faster than NVLink, and they share its arithmetic: figures from such a server say nothing about several GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

NAME = "all_ranks_on_one_gpu"  # of the plugin, which SGLang finds on PYTHONPATH
PLUGIN = """
import contextlib

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    @contextlib.contextmanager
    def first_gpu(_gpu_id):
        yield 0

    HookRegistry.register("sglang.srt.distributed.bootstrap._resolve_backend", lambda *a, **k: "gloo", HookType.REPLACE)
    HookRegistry.register("sglang.srt.utils.common.maybe_reindex_device_id", first_gpu, HookType.REPLACE)
"""


def one_gpu_environment(directory: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Variables under which all ranks of a server take GPU 0 and talk through gloo.

    Args:
        directory: Where the plugin is written.
        base: The variables that these are added to.
    """
    (directory / f"{NAME}.py").write_text(PLUGIN)
    info = directory / f"{NAME}-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{NAME} = {NAME}:register\n")
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(directory), base.get("PYTHONPATH")))),
        "SGLANG_NCCL_SO_PATH": str(directory / "no-nccl"),
        # It compares what is free on the ranks' GPUs, which changes under way where others load on the same GPU.
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    }
