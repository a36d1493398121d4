"""Rows that travel between GPUs by FlashInfer's one-sided all-to-all over NVLink, in CUDA graphs.

FlashInfer's kernels write rows straight into peers' memory and wait for a flag of each peer. Such a wait ends after
300 s of clock by a trap, which costs the process its CUDA context. So the host watches a joint forward
(`FlashInferInbox.wait`): when a peer has ended or the limit is over, it sets the missing peers' flags itself, in this
rank's own memory, until the forward has run through; its result is void, but the process goes on.

FlashInfer counts its steps in this rank's memory: one for each dispatch, one for each combine. A peer's flag is right
when it equals that number, which also says which layer waits.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sglang_dwdp.errors import DwdpRuntimeError, DwdpSetupError
from sglang_dwdp.exchange.inbox import Received, RowShape
from sglang_dwdp.memory.handshake import Exchange

TOP_K = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22)  # for which FlashInfer 0.7.2 has kernels
_SPIN_S = 0.01  # as long as `Event.synchronize` would spin for a small forward; then naps
_NAP_S = 50e-6
_LOOK_S = 0.01  # how often a wait looks whether peers live
_STEPS_PER_LAYER = 2


class Communicator:
    """FlashInfer's `CommBackend` over the handshake's sockets; used at set-up only.

    Methods have FlashInfer's names. Payloads are pickled: the handshake admits processes of the same user only.
    """

    def __init__(self, handshake: Exchange) -> None:
        self._handshake = handshake

    def Get_rank(self) -> int:
        """This rank's number."""
        return self._handshake.rank

    def Get_size(self) -> int:
        """Ranks of the group."""
        return self._handshake.size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """Every rank's `data`, in rank order."""
        return tuple(pickle.loads(answer) for answer in self._handshake.all_gather(pickle.dumps(data)))

    def bcast(self, data: Any, root: int) -> Any:
        """The `data` of rank `root`."""
        return self.allgather(data)[root]

    def barrier(self) -> None:
        """Return when all ranks have called this."""
        self._handshake.barrier()

    def Split(self, color: int, key: int) -> Communicator:
        """The group is FlashInfer's already."""
        return self


def why_unsupported(num_experts: int, size: int, shape: RowShape) -> str | None:
    """Why rows of a layer cannot travel by FlashInfer; None if they can.

    Args:
        num_experts: Of the layer.
        size: Ranks of the group.
        shape: Of its rows.
    """
    if num_experts % size or num_experts < 2 * size:
        return f"FlashInfer's all-to-all shares experts evenly, and {num_experts} experts on {size} ranks are not"
    if shape.top_k not in TOP_K:
        return f"FlashInfer's all-to-all has no kernel for {shape.top_k} experts a token"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer's all-to-all sends 16-bit rows, not {shape.dtype}"
    return None


class FlashInferInbox:
    """One rank's `Inbox` on its GPU. All MoE layers of a model share it."""

    def __init__(
        self,
        handshake: Exchange,
        num_experts: int,
        shape: RowShape,
        layer_ids: Sequence[int],
        lost: Callable[[], Sequence[int]],
    ) -> None:
        """Allocate and map the memory on the current GPU; all ranks call this together.

        The kernels are compiled at first use, for which CUDA's compiler and headers are needed.

        Args:
            handshake: Connected; used until this returns.
            num_experts: Of each layer.
            shape: Of rows.
            layer_ids: Of all MoE layers, in the order in which a forward runs them.
            lost: Which peers have died (`Page.lost`).

        Raises:
            DwdpSetupError: FlashInfer cannot do it here; it says why.
        """
        if why := why_unsupported(num_experts, handshake.size, shape):
            raise DwdpSetupError(f"{why}.")
        from flashinfer.moe_ep import (
            BootstrapConfig,
            MoEEpCommParams,
            NVLinkOneSidedAlltoAll,
            NVLinkOneSidedConfig,
        )

        self.rank, self.size, self.shape = handshake.rank, handshake.size, shape
        self._layer_ids = list(layer_ids)
        self._lost = lost
        self._void = False
        device = torch.cuda.current_device()
        params = MoEEpCommParams(
            num_experts=num_experts,
            top_k=shape.top_k,
            max_tokens_per_rank=shape.max_bucket,
            hidden_size=shape.hidden_size,
            dtype=shape.dtype,
            invalid_expert_id=-1,
        )
        try:
            self._all_to_all = NVLinkOneSidedAlltoAll(
                BootstrapConfig(world_size=self.size, rank=self.rank, device=device),
                params,
                NVLinkOneSidedConfig(comm_backend=Communicator(handshake)),
            )
        except Exception as error:
            handshake.fail(f"rank {self.rank}: FlashInfer's all-to-all: {error}")
            raise DwdpSetupError(f"FlashInfer's all-to-all cannot be set up: {error}") from error
        self._step, self._flags = _counters(self._all_to_all.alltoall, self.rank, self.size)
        self._beside: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Numbers are moved by copies alone: the first launch of a kernel may load its module, which waits for those
        # that run.
        self._host_step = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._host_flags = torch.zeros(self.size, dtype=torch.int32, pin_memory=True)

    def dispatch(
        self, layer_id: int, bucket: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Received:
        """See `Inbox.dispatch`. Tensors are contiguous and on the GPU; errors come from `wait`."""
        received = self._all_to_all.dispatch(rows, ids, weights, max_tokens_per_rank=bucket)
        return Received(received.hidden_states, received.topk_ids, received.topk_weights)

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        """See `Inbox.combine`. Sums are added in the order of a row's experts, not of ranks."""
        result: torch.Tensor = self._all_to_all.combine(partial)
        return result

    def wait(self, done: Any, limit_s: float) -> None:
        """See `Inbox.wait`."""
        start = look = time.monotonic()
        while not done.query():
            now = time.monotonic()
            if now > look:
                lost = self._lost()
                # Forwards that were launched before one that failed need not wait as long again.
                if lost or self._void or now > start + limit_s:
                    self._give_up(done, f"ranks {lost} ended" if lost else f"nothing came within {limit_s:g} s")
                look = now + _LOOK_S
            if now > start + _SPIN_S:
                time.sleep(_NAP_S)

    def close(self) -> None:
        """See `Inbox.close`. FlashInfer keeps the memory itself, in a cache of its own, until the process ends."""
        self._all_to_all.destroy()

    def _give_up(self, done: Any, why: str) -> None:
        """Let the forward run through, and raise; unless what it waited for has come after all."""
        step, missing = self._read()
        if not missing or done.query():
            return
        self._void = True
        now = step
        while not done.query():
            # Flags of peers that do come are overwritten too: the result is void, and the next turn mends it.
            self._host_flags.fill_(now)
            with torch.cuda.stream(self._beside):
                for flags in self._flags:
                    flags.copy_(self._host_flags, non_blocking=True)
            now, _ = self._read()
        layer = self._layer_ids[(step - 1) // _STEPS_PER_LAYER % len(self._layer_ids)]
        raise DwdpRuntimeError(
            f"rank {self.rank}: MoE layer {layer} of a joint forward waited for ranks {missing}: {why}."
        )

    def _read(self) -> tuple[int, list[int]]:
        """The step under way, and the peers that have yet to set their flag for it."""
        with torch.cuda.stream(self._beside):
            self._host_step.copy_(self._step, non_blocking=True)
            self._beside.synchronize()
            step = int(self._host_step)
            flags = self._flags[1 - step % _STEPS_PER_LAYER]  # odd steps dispatch
            self._host_flags.copy_(flags, non_blocking=True)
            self._beside.synchronize()
        return step, [peer for peer, flag in enumerate(self._host_flags.tolist()) if peer != self.rank and flag != step]


def _counters(all_to_all: Any, rank: int, size: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Views of FlashInfer's own numbers in this rank's memory.

    Returns:
        The step, int32 `[1]`, and peers' flags, int32 `[size]`, of dispatch and of combine.

    Raises:
        DwdpSetupError: This version of FlashInfer does not say where they are.
    """
    index, offsets = all_to_all._METAINFO_INDEX, all_to_all.metainfo.tolist()

    def view(name: str, count: int) -> torch.Tensor:
        if name not in index:
            raise DwdpSetupError(f"this version of FlashInfer does not say where {name} is, by which a wait is ended.")
        start = offsets[index[name]]
        words: torch.Tensor = all_to_all.workspace[rank, start : start + 4 * count].view(torch.int32)
        return words

    return view("FLAG_VAL_OFFSET_INDEX", 1), (
        view("DISPATCH_COMPLETION_FLAGS_OFFSET_INDEX", size),
        view("COMBINE_COMPLETION_FLAGS_OFFSET_INDEX", size),
    )
