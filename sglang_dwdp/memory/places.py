"""Where the first rank of a group waits for the others: a Unix socket within a host, a TCP port across hosts."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
from typing import Protocol

_PEERCRED = struct.Struct("3i")


class Place(Protocol):
    """Where a group meets. Its string says where that is, to the user; empty if that says nothing."""

    def listen(self) -> socket.socket:
        """A listening socket, which belongs to the caller.

        Raises:
            OSError: Another process listens there.
        """

    def visit(self, timeout_s: float) -> socket.socket:
        """A new connection with whoever listens there, with this time-out.

        Raises:
            OSError: Nobody listens there, or the time-out is over.
        """

    def admits(self, connection: socket.socket) -> bool:
        """Whether the other side may be a rank at all."""


class UnixPlace:
    """A socket within a host. Its name is abstract: it is not a file, so none can be left behind."""

    def __init__(self, secret: str) -> None:
        """Derive the name from the group's secret, which it does not give away."""
        name = hmac.new(secret.encode(), b"socket", hashlib.sha256).hexdigest()
        self.address = f"\0sglang-dwdp.{name}".encode()

    def __str__(self) -> str:
        return ""

    def listen(self) -> socket.socket:
        """As `Place.listen`."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(self.address)
            listener.listen(socket.SOMAXCONN)
        except OSError:
            listener.close()
            raise
        return listener

    def visit(self, timeout_s: float) -> socket.socket:
        """As `Place.visit`."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(timeout_s)
            connection.connect(self.address)
        except BaseException:
            connection.close()
            raise
        return connection

    def admits(self, connection: socket.socket) -> bool:
        """Processes of the same user."""
        _, uid, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        return bool(uid == os.getuid())


class TcpPlace:
    """A port that other hosts reach. Who comes there proves the secret, and that is all that is known of them."""

    def __init__(self, host: str, port: int, listener: socket.socket | None = None) -> None:
        """A port.

        Args:
            host: An IPv4 or IPv6 address, or a name.
            port: Its number.
            listener: A socket that listens there, in the process of the group's first rank.
        """
        self.host, self.port, self._listener = host, port, listener

    @classmethod
    def open(cls, host: str) -> TcpPlace:
        """Listen at a free port of one address of this host.

        Raises:
            OSError: The address is not this host's.
        """
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
        except OSError:
            listener.close()
            raise
        return cls(host, listener.getsockname()[1], listener)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def listen(self) -> socket.socket:
        """As `Place.listen`. Whoever comes between two calls waits."""
        if self._listener is None:
            raise OSError(f"{self} is another rank's to listen at")
        return self._listener.dup()

    def visit(self, timeout_s: float) -> socket.socket:
        """As `Place.visit`."""
        connection = socket.create_connection((self.host, self.port), timeout_s)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def admits(self, connection: socket.socket) -> bool:
        """Everybody."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return True

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def own_address(peer: str, port: int) -> str:
    """The address of this host from which it reaches another, so that others there reach this one.

    Args:
        peer: The other host's name or address; may be this host's.
        port: Any port; nothing is sent.

    Raises:
        OSError: There is no such host, or no way to it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(peer, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.connect(address)
        return str(trial.getsockname()[0])
