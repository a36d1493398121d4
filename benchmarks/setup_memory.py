"""How much GPU memory a rank holds at most while its experts are being shared, for any kind of DWDP.

A plugin of SGLang's for the measured servers. It adds up, in each rank's process, what torch's allocator holds and
what the driver was asked for by cuMemCreate, at every cuMemCreate between the end of loading and the sizing of the
KV cache.
"""

from __future__ import annotations

import json
from pathlib import Path

NAME = "setup_memory_probe"
PLUGIN = """
import json
import os

def register():
    from cuda.bindings import driver
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    state = {"created": 0, "before": None, "peak": 0}
    create = driver.cuMemCreate

    def counted(size, *args):
        import torch
        result = create(size, *args)
        if not int(result[0]):
            state["created"] += size
            state["peak"] = max(state["peak"], state["created"] + torch.cuda.memory_reserved())
        return result

    def loaded(_result, *args, **kwargs):
        import torch
        torch.cuda.empty_cache()
        state["before"] = state["peak"] = torch.cuda.memory_reserved()
        state["created"] = 0
        driver.cuMemCreate = counted

    def shared(*args, **kwargs):
        import torch
        if state["before"] is None:
            return
        driver.cuMemCreate = create
        torch.cuda.empty_cache()
        state["after"] = state["created"] + torch.cuda.memory_reserved()
        with open(os.path.join(os.environ["SETUP_MEMORY_DIR"], f"{os.getpid()}.json"), "w") as file:
            json.dump(state, file)

    runner = "sglang.srt.model_executor.model_runner.ModelRunner."
    HookRegistry.register(runner + "load_model", loaded, HookType.AFTER)
    HookRegistry.register(runner + "maybe_init_expert_backup_client", shared, HookType.BEFORE)
"""


def probe_environment(directory: Path) -> dict[str, str]:
    """Variables under which servers leave their readings in `directory`, which is on their PYTHONPATH."""
    (directory / f"{NAME}.py").write_text(PLUGIN)
    info = directory / f"{NAME}-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{NAME} = {NAME}:register\n")
    return {"SETUP_MEMORY_DIR": str(directory)}


def readings(directory: Path) -> list[dict[str, int]]:
    """Of each rank, bytes: held when loading was over (`before`), at most while sharing (`peak`), then (`after`)."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json")) if path.stem.isdigit()]
