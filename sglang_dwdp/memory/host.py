"""Shared host memory: anonymous memory files, mapped at fixed addresses (the CPU engine's transport).

Nothing has a name in the file system, so nothing can be left behind: the kernel frees a block when its last
descriptor and mapping are gone, however the processes ended.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.memory.base import TIMED_WAITS, Block, CopyList, Event, Handle, Range

_PROT_NONE = 0
_MAP_FIXED = 0x10  # asm-generic/mman-common.h; the mmap module does not export these
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    _check(mapped == _MAP_FAILED, f"mmap of {nbytes} bytes")
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
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._address: int | None = _mmap(None, nbytes, _PROT_NONE, flags, -1)

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

    def allow_writes(self, offset: int, nbytes: int) -> None:
        _check(_libc.mprotect(self._at(offset, nbytes), nbytes, mmap.PROT_READ | mmap.PROT_WRITE), "mprotect")

    def vacate(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(self._at(0, self.nbytes), self.nbytes, _PROT_NONE, flags, -1)

    def tensor(self, nbytes: int) -> torch.Tensor:
        address = self._at(0, nbytes)
        return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)

    def close(self) -> None:
        if self._address is not None:
            _check(_libc.munmap(self._address, self.nbytes), "munmap")
            self._address = None


class HostEvent:
    """A CUDA event's meaning on the host: the fill that it stands for was the last one, and is over or under way."""

    fill: Future[None] | None = None


class HostCopyEngine:
    """One worker thread. The compute stream is the calling thread, so what it records has happened."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._exposed_s = 0.0
        self._waits: deque[float] = deque(maxlen=TIMED_WAITS)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dwdp-copy")

    def event(self) -> HostEvent:
        return HostEvent()

    def record(self, event: Event) -> None:
        assert isinstance(event, HostEvent)
        event.fill = None

    def prepare(self, copies: CopyList) -> CopyList:
        return copies

    def fill(self, prepared: CopyList, after: Event, done: Event) -> None:
        # `after` has happened: it was recorded by this thread, or is of an earlier fill of the one worker.
        assert isinstance(done, HostEvent)
        done.fill = self._worker.submit(_copy, prepared)

    def wait(self, done: Event) -> None:
        assert isinstance(done, HostEvent)
        start = time.perf_counter()
        try:
            if done.fill is not None:
                done.fill.result(self._timeout_s)
        except TimeoutError:
            raise DwdpRuntimeError(
                f"a copy of remote experts did not end within {self._timeout_s:g} s (--dwdp-timeout-s)."
            ) from None
        except Exception as error:
            raise DwdpRuntimeError(f"copying remote experts failed: {error!r}") from error
        finally:
            self._waits.append(time.perf_counter() - start)
            self._exposed_s += self._waits[-1]

    def is_done(self, event: Event) -> bool:
        assert isinstance(event, HostEvent)
        fill = event.fill
        return fill is None or fill.done()

    def exposed_s(self) -> float:
        return self._exposed_s

    def take_waits(self) -> list[float]:
        waits = list(self._waits)
        self._waits.clear()
        return waits

    def close(self) -> None:
        self._worker.shutdown()


def _copy(copies: CopyList) -> None:
    for destination, source in copies:
        destination.copy_(source)


def _kernel_bytes(path: str, name: str) -> int:
    """A figure of the kernel's, which it gives in KiB."""
    with open(path) as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class HostMemory:
    """The host's `Memory`."""

    transport = "host-shm"
    page_bytes = mmap.PAGESIZE
    maps = True

    def __init__(self) -> None:
        self._created_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Anonymous memory, and the blocks made here (a page of a block may be mapped several times)."""
        return _kernel_bytes("/proc/self/status", "RssAnon:") + self._created_bytes

    def create(self, nbytes: int) -> HostBlock:
        if nbytes < 1 or nbytes % self.page_bytes:
            raise ValueError(f"a block has whole pages of {self.page_bytes} bytes, not {nbytes} bytes")
        if nbytes > (available := _kernel_bytes("/proc/meminfo", "MemAvailable:")):
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

    def export(self, block: Block) -> Handle:
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
