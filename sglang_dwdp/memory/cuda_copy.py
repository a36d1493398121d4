"""Copying ahead on a GPU: streams beside the compute stream, and a layer's whole copy plan in one driver call."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from cuda.bindings import driver

from sglang_dwdp.memory.base import TIMED_WAITS, CopyList, Event
from sglang_dwdp.memory.copies import Copy, joined
from sglang_dwdp.memory.cuda_driver import call

# Where each copy is a call of the driver, and takes the host microseconds: more are joined, up to so many bytes.
_MOST_CALLS, _JOINED_BYTES = 512, 32 << 20


class Stopwatch:
    """How long the compute stream stood at its waits, estimated from a sample of them.

    One wait in `every` is timed, by a pair of events around it. Pairs are read when the GPU has passed them, so nothing
    ever waits for the GPU; while many are on the way, waits are not timed.

    Args:
        every: waits that one timed wait stands for. A prime, so that over several forwards every layer's waits are
            among the timed ones.
    """

    PAIRS = 64
    EVERY = 17

    def __init__(self, every: int = EVERY) -> None:
        self._every = every
        self._waits = 0
        self._pairs: deque[tuple[Any, Any]] = deque()
        self._ms = 0.0
        self._timed: deque[float] = deque(maxlen=TIMED_WAITS)

    def start(self, stream: Any) -> Any:
        """Note that `stream` is about to wait.

        Returns:
            The event to record after the wait, or None where the wait is not timed.
        """
        is_timed = self._waits % self._every == 0
        self._waits += 1
        if not is_timed:
            return None
        self._read()
        if len(self._pairs) == self.PAIRS:
            return None
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record(stream)
        self._pairs.append((first, last))
        return last

    def seconds(self) -> float:
        """Seconds of all waits that the GPU has passed, as the timed ones show them."""
        self._read()
        return self._ms * self._every / 1000

    def take(self) -> list[float]:
        """Seconds of the waits that were timed since the last call, and that the GPU has passed."""
        self._read()
        waits = list(self._timed)
        self._timed.clear()
        return waits

    def _read(self) -> None:
        while self._pairs and self._pairs[0][1].query():
            first, last = self._pairs.popleft()
            ms = first.elapsed_time(last)
            self._ms += ms
            self._timed.append(ms / 1000)


class CudaCopyEngine:
    """Streams of the copy engines beside the compute stream.

    There are two, which take the slices of a plan in turn, so that two transfers, from two peers, are in flight.

    Nothing here may run while its caller's stream is being captured: a batch of copies in a graph can lose some of
    them without an error. Graphs are replayed between a wait and a record instead (see `staged_layers.GraphSegment`).

    Args:
        device: the GPU's index.
        time_every: one wait of the compute stream in so many is timed.
    """

    STREAMS = 2

    def __init__(self, device: int, *, time_every: int = Stopwatch.EVERY) -> None:
        self._device = device
        self._compute_streams: dict[int, torch.cuda.Stream] = {}
        self._streams = [torch.cuda.Stream(device) for _ in range(self.STREAMS)]  # type: ignore[no-untyped-call]
        self._joined = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._submit = _batch_function()
        self._stopwatch = Stopwatch(time_every)

    def event(self) -> Event:
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def record(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        event.record(self._compute_stream())

    def _compute_stream(self) -> torch.cuda.Stream:
        """The caller's stream. Looked up by its handle: torch would make a new object of it at every call."""
        handle = torch._C._cuda_getCurrentRawStream(self._device)
        stream = self._compute_streams.get(handle)
        if stream is None:
            stream = self._compute_streams[handle] = torch.cuda.current_stream(self._device)
        return stream

    def prepare(self, copies: CopyList) -> list[_Part]:
        plan = [(to.data_ptr(), source.data_ptr(), source.numel()) for to, source in copies]
        if self._submit is None and len(plan) > _MOST_CALLS:
            plan = joined(plan, _JOINED_BYTES)
        parts = [plan[first :: len(self._streams)] for first in range(len(self._streams))]
        return [_Part(self._submit, part) for part in parts if part]

    def fill(self, prepared: list[_Part], after: Event, done: Event) -> None:
        assert isinstance(after, torch.cuda.Event)
        assert isinstance(done, torch.cuda.Event)
        main = self._streams[0]
        main.wait_event(after)
        for part, stream in zip(prepared, self._streams, strict=False):
            if stream is not main:
                stream.wait_event(after)
            part.submit(stream.cuda_stream)
            if stream is not main:
                self._joined.record(stream)
                main.wait_event(self._joined)
        done.record(main)

    def wait(self, done: Event) -> None:
        assert isinstance(done, torch.cuda.Event)
        stream = self._compute_stream()
        finish = self._stopwatch.start(stream)
        stream.wait_event(done)
        if finish is not None:
            finish.record(stream)

    def is_done(self, event: Event) -> bool:
        assert isinstance(event, torch.cuda.Event)
        return bool(event.query())  # type: ignore[no-untyped-call]

    def exposed_s(self) -> float:
        return self._stopwatch.seconds()

    def take_waits(self) -> list[float]:
        return self._stopwatch.take()

    def close(self) -> None:
        for stream in self._streams:
            stream.synchronize()
        self._streams = []


class _Part:
    """What one stream copies of a plan: one `cuMemcpyBatchAsync`, whose arguments are built once.

    Where the driver lacks it (`submit` is None) the copies are submitted one by one.
    """

    def __init__(self, submit: Any, copies: Sequence[Copy]) -> None:
        self._copies = copies
        destinations, sources, sizes = zip(*copies, strict=True)
        count = len(sizes)
        self._submit = submit
        self._count = ctypes.c_size_t(count)
        self._destinations = (ctypes.c_uint64 * count)(*destinations)
        self._sources = (ctypes.c_uint64 * count)(*sources)
        self._sizes = (ctypes.c_size_t * count)(*sizes)
        self._attributes = driver.CUmemcpyAttributes()
        # The source may be read in any order with what the stream does before, which is nothing but the wait.
        self._attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        # Copy engines, not multiprocessors, which the layers before need: on an H100 whose layers take 12 times as
        # long as a fill of 604 MiB, fills made layers 5.5 % longer with this flag and 8.0 % without it.
        self._attributes.flags = driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE.value
        self._first = (ctypes.c_size_t * 1)(0)

    def submit(self, stream: int) -> None:
        if self._submit is None:
            for destination, source, nbytes in self._copies:
                call(driver.cuMemcpyAsync, destination, source, nbytes, stream)
            return
        status = self._submit(
            self._destinations,
            self._sources,
            self._sizes,
            self._count,
            ctypes.c_void_p(int(self._attributes.getPtr())),
            self._first,
            ctypes.c_size_t(1),
            ctypes.c_void_p(stream),
        )
        if status:
            raise OSError(f"cuMemcpyBatchAsync: {driver.CUresult(status).name}")


def _batch_function() -> Any:
    """The driver's function in the form that CUDA 13 gave it; None where a driver lacks it.

    Through ctypes: cuda.bindings would build the three arrays anew at every call.
    """
    function = getattr(ctypes.CDLL("libcuda.so.1"), "cuMemcpyBatchAsync_v2", None)
    if function is not None:
        function.restype = ctypes.c_int
    return function
