"""Ranks of several hosts notice when another host's end: a thread that waits on their connections.

Within a host SGLang's launcher notices a process that ends. Across hosts nobody does, since ranks never wait for each
other: requests to a lost host would hang, and the other hosts' ranks would hold their GPUs for nothing.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Mapping

_LEAVING = b"\0"
# A host that lost its power says nothing: the kernel asks after a minute of silence, and gives up after another.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


class Presence:
    """Watches peers, and says to them when this rank leaves."""

    def __init__(self, peers: Mapping[int, socket.socket], lost: Callable[[int], None]) -> None:
        """Start watching.

        Args:
            peers: Connections by rank, which nothing else uses any more.
            lost: Called in a thread, with the rank, for each that ends without having said so.
        """
        self._peers = dict(peers)
        self._lost = lost
        self._has_left = False
        for connection in self._peers.values():
            connection.settimeout(None)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in _KEEPALIVE:
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
        threading.Thread(target=self._run, name="dwdp-presence", daemon=True).start()

    def leave(self) -> None:
        """Tell the peers that this rank ends as it should. Idempotent; never raises."""
        self._has_left = True
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.send(_LEAVING)
                connection.shutdown(socket.SHUT_RDWR)  # which ends the thread too

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select():
                    rank: int = key.data
                    selector.unregister(self._peers[rank])
                    try:
                        is_leaving = self._peers[rank].recv(1) == _LEAVING
                    except OSError:
                        is_leaving = False
                    if not is_leaving and not self._has_left:
                        self._lost(rank)
