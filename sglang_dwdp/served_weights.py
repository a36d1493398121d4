"""The experts that a rank serves, as something to read, to replace, and to give back for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang_dwdp.config import TRANSPORTS
from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.experts.layer import ExpertLayer
from sglang_dwdp.experts.share import SharedExperts, blocks_of_all
from sglang_dwdp.experts.update import Experts, check_alike, read_own, replace_experts
from sglang_dwdp.memory.base import Memory
from sglang_dwdp.memory.handshake import Exchange


class ServedWeights:
    """This rank's part of the experts that a group shares. Everything here happens between forwards.

    Attributes:
        is_released: The experts' memory was given back.
    """

    def __init__(self, memory: Memory, shared: SharedExperts, rank: int, size: int, forget: Callable[[], None]) -> None:
        """Serve what was shared.

        Args:
            memory: Of this rank.
            shared: The experts.
            rank: In the group.
            size: Of the group.
            forget: Waits for copies under way, so that what slots hold is fetched anew.
        """
        self._memory, self._shared, self._rank, self._size, self._forget = memory, shared, rank, size, forget
        self.is_released = False

    @property
    def on_gpu(self) -> bool:
        """Whether they lie in a GPU's memory."""
        return TRANSPORTS[self._memory.transport].device == "cuda"

    def layers(self) -> list[ExpertLayer]:
        """The MoE layers whose experts are shared, in the order in which a forward runs them."""
        return [shared.layer for shared in self._shared.layers]

    def read(self) -> list[dict[str, torch.Tensor]]:
        """`[num_layers]`, in the order of `layers`: this rank's experts by tensor name, copied to the host.

        Raises:
            DwdpRuntimeError: their memory was released.
        """
        self.check_not_released()
        return [read_own(shared, self._rank) for shared in self._shared.layers]

    def view(self) -> list[dict[str, torch.Tensor]]:
        """As `read`, but where they lie, for kernels to read; copies where memory cannot be mapped."""
        if not self._memory.maps:
            return self.read()
        self.check_not_released()
        shards = [shared.layer.placement.shard(self._rank) for shared in self._shared.layers]
        return [
            {name: tensor[shard.start : shard.stop] for name, tensor in shared.direct.items()}
            for shared, shard in zip(self._shared.layers, shards, strict=True)
        ]

    def check(self, new: Sequence[Experts]) -> None:
        """Check, before peers are met, that new experts of this rank fit. `[num_layers]`, as `read`.

        Raises:
            DwdpUpdateError: they have other names, shapes or dtypes.
        """
        for shared, experts in zip(self._shared.layers, new, strict=True):
            check_alike(shared, experts, self._rank)

    def update(self, exchange: Exchange, new: Sequence[Experts], write_others: Callable[[], None]) -> None:
        """Serve new experts from the next forward on; see `replace_experts`."""
        first = exchange.rank - self._rank
        peers = range(first, first + self._size)
        replace_experts(self._memory, exchange, self._shared, new, self._forget, write_others, peers)

    def release(self) -> None:
        """Give the memory of experts and slots back, and keep their addresses; all ranks of the group do this.

        Between forwards. Until `restore` there must be none.

        Raises:
            DwdpRuntimeError: the transport cannot map memory again.
        """
        assert self._shared.store is not None
        self._forget()
        self._memory.finish_writes()
        self._shared.store.release()
        self.is_released = True

    def restore(self, exchange: Exchange) -> None:
        """Have memory again where there was some; what it holds is not what it held, so experts have to be updated.

        Args:
            exchange: with the group, whose ranks all call this.

        Raises:
            OSError: there is too little memory.
            DwdpSetupError: a peer failed.
        """
        assert self._shared.store is not None
        try:
            self._shared.store.restore(lambda specs, stack: blocks_of_all(self._memory, exchange, specs, stack)[0])
            exchange.barrier()
        except BaseException as error:
            exchange.fail(str(error))
            raise
        self.is_released = False

    def check_not_released(self) -> None:
        """Check that experts have memory.

        Raises:
            DwdpRuntimeError: it was released.
        """
        if self.is_released:
            raise DwdpRuntimeError("the memory of weights was released: call /resume_memory_occupation first.")
