"""New experts in place of the shared ones, on all ranks at once, at the addresses where forwards read them.

```
each rank alone   has its new shard on the host, and serves the old weights
meeting           says whether it can take it; one that cannot keeps all from it
each rank alone   its GPU has finished, and slots hold nothing; it writes its shard
meeting           all have written; copies that a rank keeps of peers' experts are fetched again
```

A rank is at the first meeting between two forwards and leaves the second one before the next, so no forward anywhere
runs while some ranks have written and others have not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sglang_dwdp.errors import DwdpError, DwdpRuntimeError, DwdpUpdateError
from sglang_dwdp.experts.share import SharedExperts, SharedLayer
from sglang_dwdp.memory.base import Memory
from sglang_dwdp.memory.handshake import Exchange

Experts = Mapping[str, torch.Tensor]  # a layer's, of this rank's shard, by tensor name


def read_own(shared: SharedLayer, rank: int) -> dict[str, torch.Tensor]:
    """This rank's experts of a layer, `[len(shard), …]` by tensor name: copies on the host."""
    shard = shared.layer.placement.shard(rank)
    return {
        name: shared.own[name].read() if name in shared.own else tensor[shard.start : shard.stop].cpu().clone()
        for name, tensor in shared.direct.items()
    }


def check_alike(shared: SharedLayer, new: Experts, rank: int) -> None:
    """Check that new experts of a layer can take the place of those that it has.

    Raises:
        DwdpUpdateError: names, shapes or dtypes differ.
    """
    count = len(shared.layer.placement.shard(rank))
    old = {name: (tensor.dtype, (count, *tensor.shape[1:])) for name, tensor in shared.direct.items()}
    for name in old.keys() | new.keys():
        found = (new[name].dtype, tuple(new[name].shape)) if name in new else None
        if found != old.get(name):
            raise DwdpUpdateError(f"layer {shared.layer.layer_id}, {name}: {old.get(name)} is served, not {found}")


def agree(exchange: Exchange, error: str | None) -> None:
    """Hear from all ranks whether they can go on.

    Args:
        exchange: with all ranks of the server.
        error: what keeps this rank from it.

    Raises:
        DwdpUpdateError: a rank cannot, or did not come.
    """
    try:
        answers = exchange.all_gather((error or "").encode()[:4096])
    except DwdpError as failure:
        raise DwdpUpdateError(str(failure)) from failure
    said = [f"rank {rank}: {answer.decode(errors='replace')}" for rank, answer in enumerate(answers) if answer]
    if said:
        raise DwdpUpdateError("; ".join(said))


def replace_experts(
    memory: Memory,
    exchange: Exchange,
    shared: SharedExperts,
    new: Sequence[Experts],
    forget_slots: Callable[[], None],
    write_others: Callable[[], None],
    peers: range,
) -> None:
    """Take new experts; all ranks that agreed to do so call this together, between two forwards.

    Args:
        memory: of this rank.
        exchange: with all ranks of the server, of which the group is a part.
        shared: what is replaced.
        new: `[num_layers]`, of this rank's shard.
        forget_slots: waits for copies under way, so that what slots hold is fetched anew afterwards.
        write_others: writes what belongs to the same update and is not shared.
        peers: the group's ranks among those of `exchange`.

    Raises:
        DwdpUpdateError: a rank was lost before any had written.
        DwdpRuntimeError: a rank failed later, so that old and new weights are mixed: the server has to end.
    """
    assert shared.store is not None
    try:
        forget_slots()
        memory.finish_writes()
        pairs = list(zip(shared.layers, new, strict=True))
        replicated = [_gather(exchange, layer, experts, peers) for layer, experts in pairs]
        exchange.barrier()  # no rank reads what is written from here on
    except DwdpError as error:
        exchange.fail(str(error))
        raise DwdpUpdateError(str(error)) from error
    try:
        with shared.store.writable():
            for (layer, experts), full in zip(pairs, replicated, strict=True):
                for name, tensor in full.items():
                    layer.direct[name].copy_(tensor)
                for name, own in layer.own.items():
                    own.write(experts[name])
            write_others()
            memory.finish_writes()
        exchange.barrier()  # all ranks have written
        shared.store.refresh()
        memory.finish_writes()
    except Exception as error:
        exchange.fail(str(error))
        raise DwdpRuntimeError(
            f"new weights were written on some ranks and not on all, so this server cannot go on: {error}"
        ) from error


def _gather(exchange: Exchange, shared: SharedLayer, new: Experts, peers: range) -> dict[str, torch.Tensor]:
    """The full tensors, `[num_experts, …]`, of those that every rank has a copy of."""
    result = {}
    for name, tensor in shared.direct.items():
        if name in shared.own:
            continue
        raw = new[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        answers = exchange.all_gather(raw.numpy().tobytes())
        experts = bytearray().join(answers[peer] for peer in peers)
        result[name] = torch.frombuffer(experts, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    return result
