"""How many experts of each layer a rank keeps: as asked, or as many as a memory budget allows (pure)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.layout import footprint, tensor_layout
from sglang_dwdp.experts.placement import Placement, check_local_experts, min_local_experts

GIB = 1 << 30
LayerSizes = tuple[Placement, Mapping[str, int]]
"""A layer's placement and, for each of its shared tensors, the bytes of one expert."""


def largest_footprint(layers: Sequence[LayerSizes], page_bytes: int, local_experts: int, depth: int) -> int:
    """Bytes of experts and of `depth` slots on the rank that needs most, if every rank keeps `local_experts`."""
    layouts = [
        {name: tensor_layout(placement, nbytes, page_bytes, local_experts) for name, nbytes in sizes.items()}
        for placement, sizes in layers
    ]
    return max(footprint(layouts, rank, depth) for rank in range(layers[0][0].group_size))


def choose_local_experts(config: DwdpConfig, layers: Sequence[LayerSizes], page_bytes: int) -> int | None:
    """How many experts of each layer every rank keeps; None for its shard alone.

    Args:
        config: has the number, or a memory budget.
        layers: `[num_layers]`.
        page_bytes: the smallest unit that memory is mapped in.

    Raises:
        DwdpConfigError: the number is out of range, or the budget is too small for the shards and the slots.
    """
    placement = max((placement for placement, _ in layers), key=lambda placement: placement.num_experts)
    num_experts, group_size = placement.num_experts, placement.group_size
    budget = config.memory_bytes
    if budget is None:
        check_local_experts(config.local_experts, num_experts, group_size)
        return config.local_experts
    depth = config.depth if config.views().staged else 0

    def needed(local_experts: int) -> int:
        return largest_footprint(layers, page_bytes, local_experts, depth)

    least = min_local_experts(num_experts, group_size)
    # What a layer keeps and what is remote of it add up to a constant, and a slot is shared by layers: a footprint
    # grows with the number of experts kept.
    fitting = bisect_right(range(least, num_experts + 1), budget, key=needed)
    if fitting == 0:
        raise DwdpConfigError(
            f"--dwdp-memory-gib {config.memory_gib:g} is too little: {least} experts of each layer and {depth} slots "
            f"take {needed(least) / GIB:.2f} GiB on a rank. Allow that much, lower --dwdp-depth, or use more ranks."
        )
    return least + fitting - 1
