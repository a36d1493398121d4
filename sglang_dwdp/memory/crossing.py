"""Whether memory can really be read by the peers of a group over several hosts: tried before anything is loaded.

That a device or a driver says so is not enough. So every rank makes a page, exports it, imports and maps those of all
others, and reads what they have written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.memory.base import Block, Handle, Memory
from sglang_dwdp.memory.handshake import Exchange
from sglang_dwdp.memory.messages import pack, unpack

NEEDS = {
    "cuda-fabric": "Fabric handles need GPUs in one NVLink domain (such as an NVL72), NVIDIA's IMEX service on each of "
    "its hosts, with the addresses of all in /etc/nvidia-imex/nodes_config.cfg, and an IMEX channel in the container "
    "(/dev/nvidia-caps-imex-channels/channel0).",
    "host-path": "On the CPU engine, ranks of a group read each other's memory within one machine only.",
}


def check_crossing(
    transport: str, make: Callable[[], Memory], exchange: Exchange, state: Callable[[], str] | None = None
) -> None:
    """Share a page with all peers, for real.

    Args:
        transport: A name of `config.TRANSPORTS` whose handles are bytes.
        make: Makes this rank's memory of that kind.
        exchange: With the peers, connected.
        state: What is to be said of the device if it cannot be done.

    Raises:
        DwdpConfigError: A rank could not make, export, import, map or read a page; the same text on all ranks.
        DwdpSetupError: A peer ended.
    """
    with ExitStack() as stack:
        made: list[tuple[Memory, Block]] = []

        def offer() -> Handle:
            memory = make()
            block = memory.create(memory.page_bytes)
            stack.callback(block.close)
            made.append((memory, block))
            return memory.export(block)

        handles = _all_ranks(transport, exchange, "makes no memory that others can map", offer, state)
        [(memory, own)] = made
        data = []

        def take() -> None:
            for rank, handle in enumerate(handles):
                block = own if rank == exchange.rank else memory.import_handle(handle, memory.page_bytes)
                stack.callback(block.close)
                pages = memory.reserve(memory.page_bytes)
                stack.callback(pages.close)
                pages.map(0, block)
                data.append(pages.tensor(memory.page_bytes))
            data[exchange.rank].fill_(exchange.rank + 1)
            memory.finish_writes()

        _all_ranks(transport, exchange, "cannot map its peers' memory", take, state)

        def read() -> None:
            found = [int(tensor[-1]) for tensor in data]
            if found != [(rank + 1) % 256 for rank in range(exchange.size)]:
                raise OSError(f"it read {found}")

        _all_ranks(transport, exchange, "reads other bytes than its peers wrote", read, state)
        data.clear()


def _all_ranks(
    transport: str, exchange: Exchange, what: str, step: Callable[[], Handle | None], state: Callable[[], str] | None
) -> list[bytes]:
    """What `step` returns on each rank; the errors of all in one text."""
    result, error = b"", ""
    try:
        handle = step()
        result = handle if isinstance(handle, bytes) else b""
    except OSError as failure:
        error = f"{failure}" + (f" ({state()})" if state is not None else "")
    answers = [unpack(answer) for answer in exchange.all_gather(pack([result, error.encode()]))]
    ranks: dict[str, list[str]] = {}
    for rank, (_, text) in enumerate(answers):
        if text:
            ranks.setdefault(text.decode(), []).append(str(rank))
    if ranks:
        found = "; ".join(f"rank {', '.join(of_error)}: {text}" for text, of_error in ranks.items())
        raise DwdpConfigError(
            f"the ranks of a group are on several hosts, and {transport} {what} ({found}). "
            f"{NEEDS.get(transport, '')} Or let groups stay within a host: set --dwdp-group-size to a divisor "
            "of the ranks of one."
        )
    return [handle for handle, _ in answers]
