"""One variant, serving: its server, or a prefill server, a decode server and the router in front of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from benchmarks.one_gpu import one_gpu_environment
from benchmarks.serving import launch
from benchmarks.serving.scenario import Scenario, Variant
from benchmarks.serving.servers import Process, choose_port, wait_healthy
from sglang_dwdp.demo.server import fewer_models, free_port


class Deployment:
    """Where requests go, and the processes behind it.

    url: for clients.  server_url: of the server whose ranks are compared (behind a router, the prefill server).
    """

    def __init__(self, url: str, server_url: str, ranks: int, processes: list[Process]) -> None:
        self.url = url
        self.server_url = server_url
        self.ranks = ranks
        self._processes = processes

    @property
    def routed(self) -> bool:
        """Whether a router picks the rank of a request."""
        return self.url != self.server_url

    def check_alive(self) -> None:
        """
        Raises:
            RunError: one of the processes has ended.
        """
        for process in self._processes:
            process.check_alive()

    def loads(self) -> list[dict[str, Any]]:
        """Every rank's queues, as SGLang's /v1/loads has them; nothing while the server does not answer."""
        with contextlib.suppress(requests.RequestException, ValueError):
            answer = requests.get(f"{self.server_url}/v1/loads", params={"include": "core"}, timeout=5)
            if answer.ok:
                loads: list[dict[str, Any]] = answer.json()["loads"]
                return loads
        return []

    def reports(self) -> list[dict[str, Any]]:
        """Every rank's DWDP counters; empty where the server has none."""
        with contextlib.suppress(requests.RequestException, ValueError):
            states = requests.get(f"{self.server_url}/server_info", timeout=30).json().get("internal_states", [])
            return sorted((s["dwdp"] for s in states if "dwdp" in s), key=lambda report: int(report["rank"]))
        return []


@contextlib.contextmanager
def serve(
    scenario: Scenario, variant: Variant, model: str, logs: Path, progress: Callable[[str], None]
) -> Iterator[Deployment]:
    """A variant that answers; stopped in the end, whatever happens.

    Raises:
        ScenarioError: the scenario's port is busy.
        RunError: a process did not come up.
    """
    with tempfile.TemporaryDirectory(prefix="compare-serving-") as directory, contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        if scenario.model.make:
            environment = fewer_models() | environment
        environment |= launch.server_environment(scenario, variant, environment)
        if scenario.one_gpu:
            environment |= one_gpu_environment(Path(directory), environment)

        def start(name: str, command: list[str]) -> Process:
            log = logs / f"{variant.name}{name and '-' + name}.log"
            process = Process(f"{variant.name}{name and ' (' + name + ')'}", command, environment, log)
            stack.callback(process.stop)
            return process

        port = choose_port(scenario.port, free_port)
        url = f"http://127.0.0.1:{port}"
        if variant.decode is None:
            flags = launch.server_flags(scenario, variant)
            server = start("", launch.server_command(model, port, flags))
            wait_healthy(server, url, scenario.start_timeout_s, progress)
            yield Deployment(url, url, variant.ranks, [server])
            return

        bootstrap, prefill_port, decode_port = free_port(), free_port(), free_port()
        prefill_url, decode_url = (f"http://127.0.0.1:{p}" for p in (prefill_port, decode_port))
        flags = launch.prefill_flags(scenario, variant, bootstrap)
        prefill = start("prefill", launch.server_command(model, prefill_port, flags))
        decode = start("decode", launch.server_command(model, decode_port, launch.decode_flags(scenario, variant)))
        wait_healthy(prefill, prefill_url, scenario.start_timeout_s, lambda text: progress(f"prefill, {text}"))
        wait_healthy(decode, decode_url, scenario.start_timeout_s, lambda text: progress(f"decode, {text}"))
        router = start("router", launch.router_command(prefill_url, bootstrap, decode_url, port))
        wait_healthy(router, url, scenario.start_timeout_s, lambda text: progress(f"router, {text}"))
        yield Deployment(url, prefill_url, variant.ranks, [prefill, decode, router])
