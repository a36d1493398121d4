"""Shared host memory: anonymous memory files, mapped at fixed addresses (the CPU engine's transport).

Nothing has a name in the file system, so nothing can be left behind: the kernel frees a block when its last
descriptor and mapping are gone, however the processes ended.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
import threading
import time
from collections.abc import Sequence

import torch

from sglang_dwdp.config import TRANSPORTS
from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.memory.base import Block, CopyList, Event, Handle, Range

_PROT_NONE = 0
_MAP_FIXED = 0x10  # asm-generic/mman-common.h; the mmap module does not export these
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if mapped == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {nbytes} bytes: {os.strerror(code)}")
    return int(mapped)


def _check(status: int, call: str) -> None:
    if status:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")


class HostBlock:
    """A memory file."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes

    def tensor(self) -> torch.Tensor:
        raise TypeError("a memory file has no address before it is mapped into a range")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class HostRange:
    """Reserved address space of this process; blocks are mapped over it with MAP_FIXED."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._address: int | None = _mmap(
            None, nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1
        )

    def _at(self, offset: int, nbytes: int) -> int:
        if self._address is None:
            raise ValueError("the range is closed")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes or offset % mmap.PAGESIZE:
            raise ValueError(f"bytes {offset}..{offset + nbytes} are not pages of a range of {self.nbytes} bytes")
        return self._address + offset

    def map(self, offset: int, block: Block) -> None:
        assert isinstance(block, HostBlock)
        address = self._at(offset, block.nbytes)
        _mmap(address, block.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, block.fd)

    def protect(self, offset: int, nbytes: int) -> None:
        _check(_libc.mprotect(self._at(offset, nbytes), nbytes, mmap.PROT_READ), "mprotect")

    def tensor(self, nbytes: int) -> torch.Tensor:
        address = self._at(0, nbytes)
        return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)

    def close(self) -> None:
        if self._address is not None:
            _check(_libc.munmap(self._address, self.nbytes), "munmap")
            self._address = None


class HostEvent:
    """A CUDA event's meaning on the host: of several recordings, waits are for the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending = 0
        self.happened = threading.Event()
        self.happened.set()

    def announce(self) -> None:
        """It will happen once more."""
        with self._lock:
            self._pending += 1
            self.happened.clear()

    def happen(self) -> None:
        """One announced time is over; it has happened when none is left."""
        with self._lock:
            self._pending -= 1
            if self._pending == 0:
                self.happened.set()


class HostCopyEngine:
    """One worker thread. The compute stream is the calling thread, so what it records has happened."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._exposed_s = 0.0
        self._error: BaseException | None = None
        self._jobs: queue.SimpleQueue[tuple[CopyList, HostEvent, HostEvent] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run, name="dwdp-copy", daemon=True)
        self._worker.start()

    def event(self) -> HostEvent:
        return HostEvent()

    def record(self, event: Event) -> None:
        assert isinstance(event, HostEvent)
        event.happened.set()

    def prepare(self, copies: CopyList) -> CopyList:
        return copies

    def fill(self, prepared: CopyList, after: Event, done: Event) -> None:
        assert isinstance(after, HostEvent)
        assert isinstance(done, HostEvent)
        done.announce()
        self._jobs.put((prepared, after, done))

    def wait(self, done: Event) -> None:
        assert isinstance(done, HostEvent)
        start = time.perf_counter()
        happened = done.happened.wait(self._timeout_s)
        self._exposed_s += time.perf_counter() - start
        if not happened:
            raise DwdpRuntimeError(
                f"a copy of remote experts did not end within {self._timeout_s:g} s (--dwdp-timeout-s)."
            )
        if self._error is not None:
            raise DwdpRuntimeError(f"copying remote experts failed: {self._error!r}") from self._error

    def exposed_s(self) -> float:
        return self._exposed_s

    def close(self) -> None:
        if self._worker.is_alive():
            self._jobs.put(None)
            self._worker.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            copies, after, done = job
            try:
                after.happened.wait()
                for destination, source in copies:
                    destination.copy_(source)
            except Exception as error:  # noqa: BLE001  (whatever it is, the waiting thread must hear of it)
                self._error = error
            done.happen()


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


class HostMemory:
    """The host's `Memory`."""

    transport = "host-shm"
    page_bytes = mmap.PAGESIZE
    maps = TRANSPORTS[transport].maps

    def __init__(self) -> None:
        self._created_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Anonymous memory, and the blocks made here (a page of a block may be mapped several times)."""
        with open("/proc/self/status") as lines:
            anonymous = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
        return anonymous + self._created_bytes

    def handle_kinds(self) -> Sequence[str]:
        return ("fd",)

    def use_handles(self, kind: str) -> None:
        assert kind == "fd"

    def create(self, nbytes: int) -> HostBlock:
        if nbytes < 1 or nbytes % self.page_bytes:
            raise ValueError(f"a block has whole pages of {self.page_bytes} bytes, not {nbytes} bytes")
        if nbytes > (available := _available_bytes()):
            raise OSError(errno.ENOMEM, f"{nbytes} bytes of host memory wanted, {available} available")
        fd = os.memfd_create("sglang-dwdp", os.MFD_CLOEXEC)
        try:
            # Not ftruncate, which takes no memory yet: later blocks could then be promised the same memory.
            os.posix_fallocate(fd, 0, nbytes)
        except BaseException:
            os.close(fd)
            raise
        self._created_bytes += nbytes
        return HostBlock(fd, nbytes)

    def export(self, block: Block) -> int:
        assert isinstance(block, HostBlock)
        return block.fd

    def import_handle(self, handle: Handle, nbytes: int) -> HostBlock:
        assert isinstance(handle, int)
        actual = os.fstat(handle).st_size
        if actual != nbytes:
            os.close(handle)
            raise OSError(f"a peer sent a block of {actual} bytes where {nbytes} were agreed on")
        return HostBlock(handle, nbytes)

    def reserve(self, nbytes: int) -> Range:
        return HostRange(nbytes)

    def trim(self) -> None:
        """The host's allocator returns large blocks by itself."""

    def finish_writes(self) -> None:
        """The host writes at once."""

    def copy_engine(self, timeout_s: float) -> HostCopyEngine:
        return HostCopyEngine(timeout_s)
