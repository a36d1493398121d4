"""What every kind of shared memory can do; the code above it uses nothing else of it.

A Block is physical memory; a Range is a contiguous piece of address space into which blocks are mapped.
Blocks are the only things that cross processes. Closing a block after it was mapped leaves the mapping:
the memory lives as long as any process maps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Block(Protocol):
    """Physical memory of `nbytes` bytes, a multiple of the page. Owns its descriptors until closed."""

    @property
    def nbytes(self) -> int: ...

    def tensor(self) -> torch.Tensor:
        """`[nbytes]` uint8, where blocks have an address of their own (`Memory.maps` is false). Not after `close`."""

    def close(self) -> None:
        """Give up this process's hold on the memory, apart from mappings. Idempotent."""


class Range(Protocol):
    """A reserved piece of address space."""

    @property
    def nbytes(self) -> int: ...

    def map(self, offset: int, block: Block) -> None:
        """Make the whole of `block` readable and writable at `offset`."""

    def protect(self, offset: int, nbytes: int) -> None:
        """Make what is mapped there read-only in this process; whole blocks."""

    def allow_writes(self, offset: int, nbytes: int) -> None:
        """Make what is mapped there writable again; whole blocks."""

    def tensor(self, nbytes: int) -> torch.Tensor:
        """`[nbytes]` uint8 over the beginning of the range. Must not be used after `close`."""

    def vacate(self) -> None:
        """Unmap everything and keep the address space, so that other blocks can be mapped there."""

    def close(self) -> None:
        """Unmap everything and give the address space back. Idempotent."""


class Event(Protocol):
    """A point in the order of one stream that the other stream can wait for."""


# What stands for a block in another process: a file descriptor, or bytes.
Handle = int | bytes

# (destination, source), uint8 tensors of equal size; what one fill copies, in order.
CopyList = Sequence[tuple[torch.Tensor, torch.Tensor]]
# Single waits that a copy engine remembers.
TIMED_WAITS = 1024


class CopyEngine(Protocol):
    """A second stream that copies while the compute stream (the caller's) goes on."""

    def event(self) -> Event:
        """A new event that has happened already."""

    def record(self, event: Event) -> None:
        """Let `event` happen when the compute stream reaches this point."""

    def prepare(self, copies: CopyList) -> Any:
        """`copies` in the form that `fill` takes; made once, at set-up."""

    def fill(self, prepared: Any, after: Event, done: Event) -> None:
        """Enqueue on the copy stream: wait for `after`, run the copies, let `done` happen. Does not block."""

    def wait(self, done: Event) -> None:
        """Hold the compute stream until `done` has happened.

        Raises:
            DwdpRuntimeError: the copies failed, or did not end in time.
        """

    def is_done(self, event: Event) -> bool:
        """Whether `event` has happened, or failed. Not while a graph is captured; for any thread."""

    def exposed_s(self) -> float:
        """Seconds, in all, that `wait` held the compute stream: copying that was not hidden under compute."""

    def take_waits(self) -> list[float]:
        """Seconds of single waits that were timed since the last call: the last `TIMED_WAITS` of them."""

    def close(self) -> None:
        """Wait for the copies under way and stop. Idempotent."""


class Memory(Protocol):
    """One kind of shared memory."""

    @property
    def transport(self) -> str:
        """Its name, a choice of `--dwdp-transport`."""

    @property
    def page_bytes(self) -> int:
        """The smallest unit that blocks are made and mapped in."""

    @property
    def maps(self) -> bool:
        """Whether blocks can be mapped into ranges. Otherwise they stay where they are, and there are no views."""

    @property
    def held_bytes(self) -> int:
        """What this process holds of the device's memory for tensors, and all blocks that it ever made.

        It is asked during set-up only, before whose end no block is freed: closed ones are still mapped.
        """

    def create(self, nbytes: int) -> Block:
        """A new block.

        Raises:
            OSError: there is not enough memory.
        """

    def export(self, block: Block) -> Handle:
        """What stands for `block` in another process. A descriptor stays the block's own."""

    def import_handle(self, handle: Handle, nbytes: int) -> Block:
        """The block behind a handle received from a peer. Takes a descriptor over.

        Raises:
            OSError: the handle stands for something else than a block of `nbytes` bytes.
        """

    def reserve(self, nbytes: int) -> Range:
        """Address space for `nbytes` bytes, with nothing mapped; only where `maps` is true."""

    def trim(self) -> None:
        """Give memory that this process has freed, but its allocator kept, back to the device."""

    def finish_writes(self) -> None:
        """Return when all that this process has written is in memory, so that a peer who is told so can read it."""

    def copy_engine(self, timeout_s: float) -> CopyEngine:
        """A copy stream. Waits of the host end after `timeout_s` seconds; for those of a GPU's stream see
        `experts.stalls`."""
