"""How many experts of each layer a rank keeps: as asked, or as many as a memory budget allows (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.layout import TensorLayout, footprint, tensor_layout
from sglang_dwdp.experts.placement import Placement

GIB = 1 << 30


def least_local_experts(num_experts: int, group_size: int) -> int:
    """The experts that a rank must keep for the group to have them all."""
    return -(-num_experts // group_size)


def refuse_local_experts(wanted: int | None, num_experts: int, group_size: int) -> None:
    """
    Raises:
        DwdpConfigError: no group of this size can keep `wanted` experts on each rank.
    """
    if wanted is not None and not least_local_experts(num_experts, group_size) <= wanted <= num_experts:
        raise DwdpConfigError(
            f"--dwdp-local-experts {wanted}: a group of {group_size} ranks keeps all {num_experts} experts when each "
            f"rank keeps at least {least_local_experts(num_experts, group_size)}, and there are no more than "
            f"{num_experts} to keep. Choose a number between."
        )


class Tensors:
    """The shared expert tensors of all layers, to be laid out for any number of local experts.

    layers: `[num_layers]`, the placement and, by tensor name, the bytes of one expert.
    """

    def __init__(self, layers: Sequence[tuple[Placement, Mapping[str, int]]], page_bytes: int) -> None:
        self._layers = layers
        self._page_bytes = page_bytes

    def layouts(self, local_experts: int | None) -> list[dict[str, TensorLayout]]:
        """`[num_layers]`, by tensor name."""
        return [
            {name: tensor_layout(placement, nbytes, self._page_bytes, local_experts) for name, nbytes in sizes.items()}
            for placement, sizes in self._layers
        ]

    def footprint(self, local_experts: int | None, slots: int) -> int:
        """Bytes that the rank which takes most of them takes."""
        layers = self.layouts(local_experts)
        return max(footprint(layers, rank, slots) for rank in range(self._layers[0][0].group_size))


def local_experts(config: DwdpConfig, tensors: Tensors, num_experts: int, group_size: int) -> int | None:
    """How many experts of each layer every rank keeps; None for its shard alone.

    num_experts: of the layer that has most of them.

    Raises:
        DwdpConfigError: the number is out of range, or the budget is too small for the shards and the slots.
    """
    if config.memory_bytes is None:
        refuse_local_experts(config.local_experts, num_experts, group_size)
        return config.local_experts
    slots = 0 if config.view == "direct" else config.depth
    least = least_local_experts(num_experts, group_size)
    for wanted in range(num_experts, least - 1, -1):
        if tensors.footprint(wanted, slots) <= config.memory_bytes:
            return wanted
    needed = tensors.footprint(least, slots)
    raise DwdpConfigError(
        f"--dwdp-memory-gib {config.memory_gib:g} is too little: {least} experts of each layer and {slots} slots take "
        f"{needed / GIB:.2f} GiB on a rank. Allow that much, lower --dwdp-depth, or take more ranks."
    )
