"""Messages on a socket: a kind, a payload and, within a host, file descriptors; and several payloads as one."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable, Sequence

from sglang_dwdp.errors import DwdpSetupError

MAX_FDS = 253  # SCM_MAX_FD: the kernel's limit for one message

HEADER = struct.Struct("!BII")  # kind, payload bytes, descriptors
_LENGTH = struct.Struct("!I")
_CMSG_CLOEXEC = 0x40000000  # MSG_CMSG_CLOEXEC: a received descriptor is not inherited by child processes


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that nothing took over."""
    for fd in fds:
        os.close(fd)


def pack(parts: Sequence[bytes]) -> bytes:
    """Byte strings as one; `unpack` takes them apart."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def unpack(data: bytes) -> list[bytes]:
    """The byte strings that `pack` joined.

    Raises:
        DwdpSetupError: `data` ends within one.
    """
    parts, at = [], 0
    while at < len(data):
        start = at + _LENGTH.size
        length = _LENGTH.unpack(data[at:start])[0] if start <= len(data) else len(data)
        at = start + length
        if at > len(data):
            raise DwdpSetupError("a peer sent a message that ends too early: is its sglang-dwdp another version?")
        parts.append(data[start:at])
    return parts


def receive(connection: socket.socket, nbytes: int) -> bytes:
    """The next `nbytes` bytes of a connection.

    Raises:
        OSError: The other side has left, or the connection's time-out is over.
    """
    data = bytearray(nbytes)
    left = memoryview(data)
    while left:
        count = connection.recv_into(left)
        if not count:
            raise ConnectionResetError
        left = left[count:]
    return bytes(data)


def _receive_with_fds(connection: socket.socket, nbytes: int) -> tuple[bytes, list[int]]:
    # Not socket.recv_fds: it leaves the flags out in some releases of Python.
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(nbytes, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), _CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, fds.tolist()


def send_message(connection: socket.socket, kind: int, payload: bytes, fds: Sequence[int] = ()) -> None:
    """Send a message, with more descriptors than the kernel takes at a time in several pieces.

    Raises:
        OSError: The other side has left, or the connection's time-out is over.
    """
    message = HEADER.pack(kind, len(payload), len(fds)) + payload
    for first in range(0, len(fds), MAX_FDS):
        if first:
            connection.sendall(message)
            message = b"\0"
        message = message[socket.send_fds(connection, [message], fds[first : first + MAX_FDS]) :]
    if message:  # a peer may have read all of it and closed, which makes even an empty send an error
        connection.sendall(message)


def receive_message(connection: socket.socket) -> tuple[int, bytes, list[int]]:
    """The kind, the payload and the descriptors of the next message.

    Raises:
        OSError: The other side has left, the connection's time-out is over, or descriptors are missing. Those that
            came are closed.
    """
    fds: list[int] = []
    try:
        header, fds = _receive_with_fds(connection, HEADER.size)
        header += receive(connection, HEADER.size - len(header)) if header else b""
        if not header:
            raise ConnectionResetError
        kind, nbytes, nfds = HEADER.unpack(header)
        payload = receive(connection, nbytes)
        for _ in range(MAX_FDS, nfds, MAX_FDS):
            fds += _receive_with_fds(connection, 1)[1]
        if len(fds) != nfds:
            raise OSError(f"{len(fds)} of {nfds} descriptors arrived (limit on open files: ulimit -n)")
    except BaseException:
        close_fds(fds)
        raise
    return kind, payload, fds
