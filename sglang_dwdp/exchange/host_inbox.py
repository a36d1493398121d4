"""Rows that travel through shared host memory: the CPU engine's inbox.

Every rank writes its rows where all can read them, says so with a number that counts layers, and waits for the numbers
of the others; then the same with partial sums. One buffer of each is enough: a rank writes rows anew only when it has
seen the partial sums of every peer, each of whom had read its rows before; and writes partial sums anew only when it
has seen every peer's next rows, each of whom had added its sums before.

A number is written, and what it announces is read, under the lock of a byte of its rank (`lock.py`), which orders
memory on every architecture.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange.inbox import Received, RowShape
from sglang_dwdp.exchange.lock import lock, reopen, unlock
from sglang_dwdp.memory.handshake import Exchange

_ALIGN = 64
_SPINS = 200
_NAP_S = 20e-6
_LOOK_S = 0.01  # how often a wait looks whether the peer lives
_ROWS, _SUMS = 0, 1
_WHAT = ("rows", "partial sums")


class HostInbox:
    """One rank's `Inbox` in host memory that the group shares."""

    def __init__(
        self, fd: int, rank: int, size: int, shape: RowShape, limit_s: float, lost: Callable[[], Sequence[int]]
    ) -> None:
        """Map the memory.

        Args:
            fd: Descriptor of a memory file of `nbytes(size, shape)`, the same on all ranks; it stays the caller's.
            rank: Of this process.
            size: Ranks of the group.
            shape: Of rows.
            limit_s: Longest wait for a peer, in seconds.
            lost: Which peers have died (`Page.lost`).
        """
        self.rank, self.size, self.shape = rank, size, shape
        self._limit_s, self._lost = limit_s, lost
        self._fd = reopen(fd)
        self._map: mmap.mmap | None = mmap.mmap(self._fd, nbytes(size, shape))
        self._counts, self._rows, self._ids, self._weights, self._sums = _views(self._map, size, shape)
        self._layer = 0  # layers so far
        self._layer_id = self._bucket = self._sent = -1

    def dispatch(
        self, layer_id: int, bucket: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Received:
        """See `Inbox.dispatch`.

        Raises:
            ValueError: There are more rows than the bucket has, or it is larger than was agreed on.
        """
        sent = len(rows)
        if not sent <= bucket <= self.shape.max_bucket:
            raise ValueError(f"{sent} rows, a bucket of {bucket}: at most {self.shape.max_bucket} were agreed on")
        self._layer += 1
        self._layer_id, self._bucket, self._sent = layer_id, bucket, sent
        self._rows[self.rank, :sent] = rows
        self._ids[self.rank, :sent] = ids
        self._ids[self.rank, sent:bucket] = -1
        self._weights[self.rank, :sent] = weights
        self._announce(_ROWS)
        return Received(
            self._rows[:, :bucket].flatten(0, 1),
            self._ids[:, :bucket].flatten(0, 1),
            self._weights[:, :bucket].flatten(0, 1),
        )

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        """See `Inbox.combine`."""
        bucket, sent = self._bucket, self._sent
        self._sums[self.rank, :, :bucket] = partial.view(self.size, bucket, -1)
        self._announce(_SUMS)
        total = torch.zeros(sent, self.shape.hidden_size)
        for peer in range(self.size):
            total += self._sums[peer, self.rank, :sent]
        return total.to(self.shape.dtype)

    def wait(self, done: Any, limit_s: float) -> None:
        """See `Inbox.wait`."""

    def close(self) -> None:
        """See `Inbox.close`."""
        if self._map is not None:
            del self._counts, self._rows, self._ids, self._weights, self._sums
            self._map = None  # unmapped with the last tensor that looks into it
            os.close(self._fd)

    def _announce(self, phase: int) -> None:
        """Say that this rank has written, and wait until all peers have."""
        self._lock(self.rank, phase)
        self._counts[phase, self.rank] = self._layer
        unlock(self._fd, self.rank)
        deadline = time.monotonic() + self._limit_s
        for peer in range(self.size):
            self._wait(phase, peer, deadline)
            self._lock(peer, phase)
            unlock(self._fd, peer)

    def _wait(self, phase: int, peer: int, deadline: float) -> None:
        count = self._counts[phase, peer]
        for _ in range(_SPINS):
            if count >= self._layer:
                return
        look = 0.0
        while count < self._layer:
            now = time.monotonic()
            if now > look:
                # It may have written just before it ended, so look at the number once more.
                if peer in self._lost() and count < self._layer:
                    raise self._missing(phase, peer, "its process ended")
                if now > deadline:
                    raise self._missing(phase, peer, f"not within {self._limit_s:g} s")
                look = now + _LOOK_S
            time.sleep(_NAP_S)

    def _lock(self, peer: int, phase: int) -> None:
        if not lock(self._fd, peer, self._limit_s):
            raise self._missing(phase, peer, f"it was stopped while it announced them, for {self._limit_s:g} s")

    def _missing(self, phase: int, peer: int, why: str) -> DwdpRuntimeError:
        return DwdpRuntimeError(
            f"rank {self.rank}: MoE layer {self._layer_id} of a joint forward: "
            f"rank {peer} sent no {_WHAT[phase]}: {why}."
        )


def _parts(size: int, shape: RowShape) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    places = (size, shape.max_bucket)
    return [
        (torch.int64, (2, size)),  # layers that each rank has written: rows, partial sums
        (shape.dtype, (*places, shape.hidden_size)),
        (torch.int32, (*places, shape.top_k)),
        (torch.float32, (*places, shape.top_k)),
        (shape.dtype, (size, *places, shape.hidden_size)),  # partial sums, by the rank that computed them
    ]


def _nbytes(dtype: torch.dtype, dims: tuple[int, ...]) -> int:
    return -(-prod(dims) * dtype.itemsize // _ALIGN) * _ALIGN


def nbytes(size: int, shape: RowShape) -> int:
    """Bytes of memory that the inboxes of a group of `size` ranks share."""
    return sum(_nbytes(dtype, dims) for dtype, dims in _parts(size, shape))


def _views(memory: mmap.mmap, size: int, shape: RowShape) -> list[torch.Tensor]:
    views, offset = [], 0
    for dtype, dims in _parts(size, shape):
        views.append(torch.frombuffer(memory, dtype=dtype, count=prod(dims), offset=offset).view(dims))
        offset += _nbytes(dtype, dims)
    return views


def create(size: int, shape: RowShape) -> int:
    """Memory for the inboxes of a group.

    Returns:
        The descriptor of a memory file without a name.

    Raises:
        OSError: There is not enough memory.
    """
    fd = os.memfd_create("sglang-dwdp-inbox", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, nbytes(size, shape))
    except BaseException:
        os.close(fd)
        raise
    return fd


def share_inbox(handshake: Exchange, shape: RowShape, limit_s: float, lost: Callable[[], Sequence[int]]) -> HostInbox:
    """Make the memory and hand it to all ranks, which call this together at set-up.

    Raises:
        DwdpSetupError: A peer failed, ended, or did not answer in time.
    """
    fds = [create(handshake.size, shape)] if handshake.rank == 0 else []
    try:
        received = handshake.all_gather_fds(fds)
        fds = fds or received[0]
        return HostInbox(fds[0], handshake.rank, handshake.size, shape, limit_s, lost)
    finally:
        for fd in fds:
            os.close(fd)
