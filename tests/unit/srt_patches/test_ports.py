"""Servers on neighbouring ports get inner ports of their own, in all of their processes alike."""

from __future__ import annotations

import errno
import itertools
import pickle
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import server_args as sglang_server_args

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches import ports
from sglang_dwdp.srt_patches.arguments import attach
from sglang_dwdp.srt_patches.ports import free_block, use_free_ports


def arguments(port: int, *, dwdp: bool = True) -> Any:
    result = SimpleNamespace(port=port, dist_init_addr=None, node_rank=0, device="cuda", tp_size=2)
    attach(result, DwdpConfig() if dwdp else None)
    return result


def first_port(server_args: Any) -> int:
    """As `PortArgs.init_new` makes it."""
    return use_free_ports(lambda given: given.port + sglang_server_args.ZMQ_TCP_PORT_DELTA, server_args)


def test_neighbours_get_blocks_apart() -> None:
    random.seed(1)
    starts = sorted(first_port(arguments(30000 + number)) for number in range(8))
    assert all(later - earlier >= 8 for earlier, later in itertools.pairwise(starts))


def test_the_rendezvous_is_in_the_block_too() -> None:
    server_args = arguments(30000)
    first = first_port(server_args)
    assert use_free_ports(lambda _given: sglang_server_args.get_free_port_below_ephemeral(), server_args) == first + 7


def test_a_block_that_a_server_has_not_bound_yet_is_no_other_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_RANGE", range(19000, 19016, 8))  # two blocks that no server gets
    monkeypatch.setattr(ports, "_TRIES", 2)
    other = (
        "from sglang_dwdp.srt_patches import ports; ports._RANGE, ports._TRIES = range(19000, 19008, 8), 1\n"
        "print(ports.free_block(lambda port: True), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 19000
        assert free_block(lambda _port: True) == 19008
        with pytest.raises(DwdpConfigError, match="no 8 ports in a row"):
            free_block(lambda _port: True)
        process.kill()
    assert free_block(lambda _port: True) == 19000  # given back when its process ended


def test_a_claim_that_fails_otherwise_is_not_taken_for_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise PermissionError(errno.EPERM, "not in this sandbox")

    monkeypatch.setattr("socket.socket.bind", refuse)
    with pytest.raises(PermissionError, match="not in this sandbox"):
        free_block(lambda _port: True)


def test_all_processes_of_a_server_agree() -> None:
    launcher = arguments(30000)
    first = first_port(launcher)
    assert first_port(pickle.loads(pickle.dumps(launcher))) == first == first_port(launcher)


def test_sglangs_own_choice_is_left_where_it_is_asked_for() -> None:
    delta = sglang_server_args.ZMQ_TCP_PORT_DELTA
    assert first_port(arguments(30000, dwdp=False)) == 30000 + delta
    addressed = arguments(30000)
    addressed.dist_init_addr = "10.0.0.1:5000"
    assert first_port(addressed) == 30000 + delta


def test_another_host_does_not_look_for_the_first_hosts_ports_on_its_own() -> None:
    wait = sglang_server_args.wait_port_available
    elsewhere = arguments(30000)
    elsewhere.dist_init_addr, elsewhere.node_rank = "10.0.0.1:5000", 1

    def looked(_given: Any) -> bool:
        return sglang_server_args.wait_port_available(-1, "a port that there is not")

    assert use_free_ports(looked, elsewhere)
    assert sglang_server_args.wait_port_available is wait
    elsewhere.node_rank = 0
    with pytest.raises(ValueError, match="a port that there is not"):
        use_free_ports(looked, elsewhere)


def test_a_block_is_free_throughout() -> None:
    taken = {port for port in range(20000, 30000) if port % 70 != 3}
    assert free_block(lambda port: port >= 25000) >= 24999
    with pytest.raises(DwdpConfigError, match="Set --dist-init-addr"):
        free_block(lambda port: port not in taken)
