"""Handing blocks to peers: each rank makes its own, and gets those of all others."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import ExitStack

from sglang_dwdp.memory.base import Block, Handle, Memory
from sglang_dwdp.memory.handshake import Exchange, close_fds


def swap_blocks(
    memory: Memory, exchange: Exchange, sizes: Sequence[Sequence[int]], stack: ExitStack
) -> list[list[Block]]:
    """Make this rank's blocks and import its peers'; `stack` closes all of them.

    One message for each call, so few descriptors are open at a time.

    Args:
        memory: of this rank.
        exchange: with the peers.
        sizes: `[group_size]`, the bytes of each of a rank's blocks; the same on all ranks.
        stack: gets a callback for each block.

    Returns:
        `[group_size]`, the blocks of each rank.

    Raises:
        DwdpSetupError: a peer failed.
        OSError: there is not enough memory, or a block cannot be exported or imported.
    """

    def kept(block: Block) -> Block:
        stack.callback(block.close)
        return block

    own = [kept(memory.create(nbytes)) for nbytes in sizes[exchange.rank]]
    handles = [memory.export(block) for block in own]
    received: Sequence[Sequence[Handle]]
    if memory.has_fds:
        received = exchange.all_gather_fds([handle for handle in handles if isinstance(handle, int)])
    else:
        received = [pickle.loads(answer) for answer in exchange.all_gather(pickle.dumps(handles))]
    unclaimed = [handle for sent in received for handle in sent if isinstance(handle, int)]
    stack.callback(lambda: close_fds(unclaimed))
    blocks: list[list[Block]] = []
    for peer, sent in enumerate(received):
        if peer == exchange.rank:
            blocks.append(own)
            continue
        blocks.append([])
        for nbytes, handle in zip(sizes[peer], sent, strict=True):
            if isinstance(handle, int):
                unclaimed.remove(handle)  # the import takes it over, also where it fails
            blocks[peer].append(kept(memory.import_handle(handle, nbytes)))
    return blocks
