"""One variant, serving: its server, or a prefill server, a decode server and the router in front of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests

from benchmarks.one_gpu import one_gpu_environment
from benchmarks.serving import launch
from benchmarks.serving.ports import check_free, reserved_port
from benchmarks.serving.scenario import Scenario, Variant
from benchmarks.serving.servers import FAILED, Process, reason, wait_healthy
from sglang_dwdp.demo.server import fewer_models


class Deployment:
    """Where requests go, and the processes behind it.

    url: for clients.  server_url: of the server whose ranks are compared (behind a router, the prefill server).
    processes: each with its own URL.
    """

    def __init__(self, url: str, server_url: str, ranks: int, processes: Mapping[str, Process]) -> None:
        self.url = url
        self.server_url = server_url
        self.ranks = ranks
        self._processes = dict(processes)

    def wait(self, timeout_s: float, progress: Callable[[str], None]) -> float:
        """Return when every process answers; how many seconds that took since the first was started.

        Raises:
            RunError: a process ended, or did not answer within `timeout_s` seconds of its start.
        """
        for url, process in self._processes.items():
            wait_healthy(process, url, timeout_s, progress)
            process.watch_workers()
        return time.monotonic() - min(process.started for process in self._processes.values())

    def ask_to_stop(self) -> None:
        """Let the processes begin to end, and go on."""
        for process in self._processes.values():
            process.ask_to_stop()

    def stop(self, timeout_s: float) -> None:
        """End the processes, by force after so many seconds. Idempotent."""
        self.ask_to_stop()
        for process in self._processes.values():
            process.stop(timeout_s)

    @property
    def routed(self) -> bool:
        """Whether a router picks the rank of a request."""
        return self.url != self.server_url

    def check_alive(self) -> None:
        """
        Raises:
            RunError: one of the processes has ended.
        """
        for process in self._processes.values():
            process.check_alive()

    def trouble(self) -> str:
        """What is wrong with a process that still runs, for a message: SGLang takes a minute to go down, or stays."""
        for process in self._processes.values():
            if FAILED in process.log.read_text(errors="replace"):
                return f"; a scheduler of {process.name} failed: {reason(process.log)} (log: {process.log})"
            gone = process.lost()
            if gone:
                return f"; {process.name} lost {gone}"
        return ""

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
def start(scenario: Scenario, variant: Variant, model: str, logs: Path) -> Iterator[Deployment]:
    """A variant whose processes have been started, in time to be waited for; stopped in the end, whatever happens.

    Raises:
        ScenarioError: the scenario's port is busy.
        RunError: a process could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="compare-serving-") as directory, contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        if scenario.model.make:
            environment = fewer_models() | environment
        environment |= launch.server_environment(scenario, variant, environment)
        if scenario.one_gpu:
            environment |= one_gpu_environment(Path(directory), environment)
        processes: dict[str, Process] = {}

        def begin(role: str, url: str, command: list[str]) -> None:
            name, log = (f"{variant.name} ({role})", f"{variant.name}-{role}") if role else (variant.name, variant.name)
            processes[url] = Process(name, command, environment, logs / f"{log}.log")
            stack.callback(processes[url].stop)

        def port() -> int:
            return stack.enter_context(reserved_port())

        if scenario.port:
            check_free(scenario.port)
        front = scenario.port or port()
        url = f"http://127.0.0.1:{front}"
        if variant.decode is None:
            begin("", url, launch.server_command(model, front, launch.server_flags(scenario, variant)))
            yield Deployment(url, url, variant.ranks, processes)
            return

        bootstrap, prefill_port, decode_port = port(), port(), port()
        prefill_url, decode_url = (f"http://127.0.0.1:{number}" for number in (prefill_port, decode_port))
        flags = launch.prefill_flags(scenario, variant, bootstrap)
        begin("prefill", prefill_url, launch.server_command(model, prefill_port, flags))
        flags = launch.decode_flags(scenario, variant)
        begin("decode", decode_url, launch.server_command(model, decode_port, flags))
        begin("router", url, launch.router_command(prefill_url, bootstrap, decode_url, front))
        yield Deployment(url, prefill_url, variant.ranks, processes)
