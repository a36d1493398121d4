"""A server's inner ports are free ones, so that servers of a host that start together do not collide.

SGLang derives a block of them from --port: two servers with ports less than seven apart want some of the same. And it
picks one at random for the ranks' rendezvous, which the first rank binds many seconds later: by then another server
may have it. Here all of them are from one block, which a server claims before it binds any. With several hosts
--dist-init-addr says where the block is on the first one; SGLang wants it to be free on all of them.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt import server_args as sglang_server_args
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.utils.network import is_port_available

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches.attached import config_of
from sglang_dwdp.srt_patches.hooks import Hook

_BLOCK = "_dwdp_ports"  # attribute of server arguments, which SGLang carries to its processes
_BLOCK_SIZE = 8  # seven that SGLang derives from one another, and the one of the rendezvous
_RANGE = range(20000, 30000, _BLOCK_SIZE)  # below those that systems hand out by themselves
_TRIES = 200


def use_free_ports(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `PortArgs.init_new`, which adds a constant to --port for the first port, and asks for the rendezvous's."""
    if config_of(server_args) is None:
        return original(server_args, *args, **kwargs)
    if server_args.node_rank:
        with _replaced("wait_port_available", lambda *_: True):  # for the first host's ports: they are not this one's
            return original(server_args, *args, **kwargs)
    if server_args.dist_init_addr is not None:
        return original(server_args, *args, **kwargs)
    if not hasattr(server_args, _BLOCK):
        setattr(server_args, _BLOCK, free_block())
    first = getattr(server_args, _BLOCK)
    with (
        _replaced("ZMQ_TCP_PORT_DELTA", first - server_args.port),
        _replaced("get_free_port_below_ephemeral", lambda: first + _BLOCK_SIZE - 1),  # asked without --nccl-port
    ):
        return original(server_args, *args, **kwargs)


@contextmanager
def _replaced(name: str, value: Any) -> Iterator[None]:
    before = getattr(sglang_server_args, name)
    setattr(sglang_server_args, name, value)
    try:
        yield
    finally:
        setattr(sglang_server_args, name, before)


def free_block(is_free: Callable[[int], bool] = is_port_available) -> int:
    """The first of `_BLOCK_SIZE` ports in a row that are free, and that no other server gets while this process lives.

    Raises:
        DwdpConfigError: None was found.
    """
    for first in random.sample(_RANGE, _TRIES):
        if all(is_free(port) for port in range(first, first + _BLOCK_SIZE)) and _claim(first):
            return first
    raise DwdpConfigError(
        f"no {_BLOCK_SIZE} ports in a row between {_RANGE.start} and {_RANGE.stop} are free. Set --dist-init-addr "
        f"127.0.0.1:PORT, where the {_BLOCK_SIZE - 1} ports from PORT on are."  # which is the rendezvous then
    )


def _claim(first: int) -> bool:
    """Take a block, where no process of this network namespace has it; the system gives it back when this one ends."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0ports of sglang_dwdp from {first}")
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    _claims.append(claim)
    return True


_claims: list[socket.socket] = []


HOOKS = (Hook("sglang.srt.server_args.PortArgs.init_new", HookType.AROUND, use_free_ports),)
