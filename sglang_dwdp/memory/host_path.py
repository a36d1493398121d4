"""Shared host memory whose blocks are handed out as paths: for groups over hosts on the CPU engine, in tests.

A peer opens an anonymous memory file through its owner's entry in /proc. That takes no descriptor along, so it can be
sent over TCP, and there is no name that a crash could leave behind. The "hosts" have to be one machine.
"""

from __future__ import annotations

import os

from sglang_dwdp.memory.base import Block, Handle
from sglang_dwdp.memory.host import HostBlock, HostMemory


class HostPathMemory(HostMemory):
    """The host's `Memory`, with bytes for handles."""

    transport = "host-path"

    def export(self, block: Block) -> Handle:
        assert isinstance(block, HostBlock)
        return f"/proc/{os.getpid()}/fd/{block.fd}".encode()

    def import_handle(self, handle: Handle, nbytes: int) -> HostBlock:
        assert isinstance(handle, bytes)
        return super().import_handle(os.open(handle, os.O_RDWR | os.O_CLOEXEC), nbytes)
