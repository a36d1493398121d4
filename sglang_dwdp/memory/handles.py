"""Handing blocks to peers: each rank makes its own, and gets those of all others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from sglang_dwdp.memory.base import Block, Handle, Memory
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.messages import close_fds, pack, unpack


def swap_blocks(
    memory: Memory, exchange: Exchange, sizes: Sequence[Sequence[int]], stack: ExitStack, payload: bytes = b""
) -> tuple[list[list[Block]], list[bytes]]:
    """Make this rank's blocks and import its peers'; `stack` closes all of them.

    One message for each call, so few descriptors are open at a time. A peer may not have imported this rank's blocks
    yet when this returns, so they have to stay open until the peers' next message.

    Args:
        memory: Of this rank.
        exchange: With the peers.
        sizes: `[group_size]`, the bytes of each of a rank's blocks; the same on all ranks.
        stack: Gets a callback for each block.
        payload: What else this rank has for all.

    Returns:
        `[group_size]`, the blocks of each rank; `[group_size]`, the payload of each.

    Raises:
        DwdpSetupError: A peer failed; an import that fails for that is no cause of its own.
        OSError: There is not enough memory, or a block cannot be exported or imported.
    """

    def kept(block: Block) -> Block:
        stack.callback(block.close)
        return block

    own = [kept(memory.create(nbytes)) for nbytes in sizes[exchange.rank]]
    handles = [memory.export(block) for block in own]
    fds = [handle for handle in handles if isinstance(handle, int)]
    answers = exchange.swap(pack([payload, *(one for one in handles if isinstance(one, bytes))]), fds)
    unclaimed = [fd for _, received in answers for fd in received]
    stack.callback(lambda: close_fds(unclaimed))
    blocks: list[list[Block]] = []
    payloads: list[bytes] = []
    for peer, (answer, received) in enumerate(answers):
        other, *named = unpack(answer)
        payloads.append(other)
        if peer == exchange.rank:
            blocks.append(own)
            continue
        blocks.append([])
        sent: list[Handle] = [*received, *named]
        for nbytes, handle in zip(sizes[peer], sent, strict=True):
            if isinstance(handle, int):
                unclaimed.remove(handle)  # the import takes it over, also where it fails
            try:
                blocks[peer].append(kept(memory.import_handle(handle, nbytes)))
            except OSError:
                exchange.check_failed()
                raise
    return blocks, payloads
