"""NVTX ranges for Nsight Systems, where SGLANG_DWDP_NVTX=1 asks for them; without it nothing here runs in a forward."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from sglang_dwdp.experts.slots import Prefetcher

VARIABLE = "SGLANG_DWDP_NVTX"


def annotate(prefetcher: Prefetcher, layer_ids: list[int]) -> None:
    """Put ranges around a prefetcher's waits and releases, named by the model's layers, if they are asked for.

    Args:
        prefetcher: of staged experts.
        layer_ids: `[num_layers]`, by position.
    """
    if os.environ.get(VARIABLE) != "1":
        return
    import torch.cuda.nvtx as nvtx

    def ranged(call: Callable[[int], None], what: str) -> Callable[[int], None]:
        names = [f"dwdp {what} layer {layer}" for layer in layer_ids]

        @functools.wraps(call)
        def in_range(position: int) -> None:
            with nvtx.range(names[position]):
                call(position)

        return in_range

    methods: dict[str, Any] = vars(prefetcher)
    methods["wait"] = ranged(prefetcher.wait, "wait")
    methods["release"] = ranged(prefetcher.release, "fetch after")
