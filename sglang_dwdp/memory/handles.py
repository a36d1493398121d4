"""Handing blocks to peers: each rank makes its own, and gets everybody else's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.experts.layout import Span
from sglang_dwdp.memory.base import Block, Memory
from sglang_dwdp.memory.handshake import Exchange, close_fds

Wanted = Sequence[tuple[str, Span]]  # (tensor, what the block holds of it), equal on all ranks
Blocks = Mapping[int, Sequence[tuple[str, Span, Block]]]  # by rank


def agree_on_handles(memory: Memory, exchange: Exchange) -> str:
    """Let `memory` use the best kind of handle that works on every rank; returns it.

    Raises:
        DwdpSetupError: there is none.
    """
    offers = [answer.decode().split() for answer in exchange.all_gather(" ".join(memory.handle_kinds()).encode())]
    for kind in offers[exchange.rank]:
        if all(kind in offer for offer in offers):
            memory.use_handles(kind)
            return kind
    raise DwdpSetupError(f"the ranks have no way in common to hand memory to each other: {offers}")


def swap_blocks(
    memory: Memory, exchange: Exchange, kind: str, wanted: Mapping[int, Wanted], stack: ExitStack
) -> Blocks:
    """Make this rank's blocks and import its peers'; `stack` closes all of them.

    One message for each call, so few descriptors are open at a time.

    wanted: of every rank.  kind: of handle, see `agree_on_handles`.

    Raises:
        DwdpSetupError: a peer failed, or sent something else than what was agreed on.
        OSError: there is not enough memory, or a block cannot be exported or imported.
    """

    def kept(block: Block) -> Block:
        stack.callback(block.close)
        return block

    own = [(name, span, kept(memory.create(span.nbytes))) for name, span in wanted[exchange.rank]]
    handles = [memory.export(block) for _, _, block in own]
    if kind == "fd":
        received: Sequence[Sequence[int | bytes]] = exchange.all_gather_fds([h for h in handles if isinstance(h, int)])
        unclaimed = [fd for fds in received for fd in fds if isinstance(fd, int)]
    else:
        joined = b"".join(h for h in handles if isinstance(h, bytes))
        received = [_split(data, len(wanted[peer])) for peer, data in enumerate(exchange.all_gather(joined))]
        unclaimed = []
    stack.callback(lambda: close_fds(unclaimed))
    blocks = {exchange.rank: own}
    for peer, theirs in enumerate(received):
        if peer == exchange.rank:
            continue
        if len(theirs) != len(wanted[peer]):
            raise DwdpSetupError(f"rank {peer} sent {len(theirs)} blocks, {len(wanted[peer])} were agreed on")
        blocks[peer] = []
        for (name, span), handle in zip(wanted[peer], theirs, strict=True):
            if isinstance(handle, int):
                unclaimed.remove(handle)  # the import takes it over, also where it fails
            blocks[peer].append((name, span, kept(memory.import_handle(handle, span.nbytes))))
    return blocks


def _split(data: bytes, count: int) -> list[bytes]:
    size = len(data) // count if count else 0
    return [data[i * size : (i + 1) * size] for i in range(count)] if size else []
