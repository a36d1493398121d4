"""Servers over two hosts, which are one machine here: SGLang and this package go by --node-rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from sglang_dwdp.demo.server import Server, free_port
from tests.e2e.conftest import FLAGS, Footprint, Reference
from tests.e2e.test_parity import compare
from tests.fixtures.families import Family

Models = Callable[[Family, int], Path]
RANKS = 4


@contextlib.contextmanager
def two_hosts(model: Path, directory: Path, *dwdp: str) -> Iterator[list[Server]]:
    """The two halves of a server, first host first."""
    port = free_port()
    footprint = Footprint(directory)
    environment = {"TMPDIR": str(directory), "OMP_NUM_THREADS": "1"}
    hosts: dict[int, Server] = {}
    try:
        for host in (0, 1):
            where = ("--nnodes", "2", "--node-rank", str(host), "--dist-init-addr", f"127.0.0.1:{port}")
            hosts[host] = Server(
                model,
                RANKS,
                directory / f"log{host}",
                dwdp=dwdp,
                flags=(*FLAGS, *where),
                environment=environment,
            )
        yield [hosts[0], hosts[1]]
        assert footprint.left() == set()
    finally:
        for server in hosts.values():
            server.kill()


def test_two_groups_with_redundant_experts(models: Models, reference: Reference, tmp_path: Path) -> None:
    """Each on a host of its own: two ranks share one set of 8 experts, and two another; each keeps 6 of them."""
    dwdp = ("--dwdp-group-size", "2", "--dwdp-local-experts", "6", "--dwdp-direct-max-tokens", "64")
    with two_hosts(models("qwen3_moe", 8), tmp_path, *dwdp) as hosts:
        for server in hosts:
            server.wait()
        compare(hosts[0], RANKS, reference("qwen3_moe", 8))
        reports = hosts[0].reports()
        assert [report["transport"] for report in reports] == ["host-shm"] * RANKS
        assert [(report["group"], report["rank"]) for report in reports] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for report in reports:
            assert min(report[k] for k in ("bytes_copied", "direct_forwards", "staged_forwards")) > 0
        hosts[0].stop()
        assert hosts[1].process.wait(30) == 0
        for server in hosts:
            assert "is gone" not in server.log.read_text()


def test_a_group_over_hosts_and_the_loss_of_a_rank(models: Models, reference: Reference, tmp_path: Path) -> None:
    """Which ends both hosts: the ranks of the first one notice by themselves."""
    with two_hosts(models("qwen3_moe", 8), tmp_path, "--dwdp-audit", "--dwdp-direct-max-tokens", "64") as hosts:
        for server in hosts:
            server.wait()
        compare(hosts[0], RANKS, reference("qwen3_moe", 8))
        for report in hosts[0].reports():
            assert (report["group_size"], report["transport"]) == (RANKS, "host-path")
            assert min(report[k] for k in ("bytes_copied", "bytes_read_in_place")) > 0
        [lost] = [one for one in psutil.Process(hosts[1].process.pid).children(recursive=True) if "TP3" in one.name()]
        lost.kill()
        for server in hosts:
            assert server.process.wait(30) != 0
        assert "DWDP: rank 3 on host 1 is gone" in hosts[0].log.read_text()
