"""One variant, serving: its server, or a prefill server, a decode server and SGLang's router in front of them."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import requests

from benchmarks.processes import Process, RunError, reason
from benchmarks.serving.scenario import Scenario, ServedVariant
from benchmarks.variants import DIVIDED, WAITING, environment, kind_options
from sglang_dwdp.cpu import engine as cpu_engine
from sglang_dwdp.demo.server import free_port, rank_of

_POLL_S = 0.5


def server_flags(scenario: Scenario, variant: ServedVariant) -> dict[str, Any]:
    """Flags of a variant's server but model, host and port: the scenario's, then the kind's, then the variant's own."""
    flags: dict[str, Any] = {}
    if scenario.gpus == 0:
        flags |= cpu_engine.default_flags()
    if scenario.chunk_tokens:
        flags["chunked-prefill-size"] = scenario.chunk_tokens * (scenario.ranks if variant.kind in DIVIDED else 1)
    if scenario.together > 1 and variant.kind not in WAITING:
        flags["sleep-on-idle"] = True  # servers that wait leave the cores to the one that is measured
    kind = {"tp_size": 1} if variant.kind == "single" else kind_options(variant.kind, scenario.ranks)
    merged = flags | scenario.flags | kind | variant.flags
    return {name.replace("_", "-"): value for name, value in merged.items()}


def split_flags(scenario: Scenario, variant: ServedVariant, bootstrap: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags of a disaggregated variant's prefill and decode server, which meet at port `bootstrap`."""
    decode = variant.decode
    assert decode is not None
    backend = {"disaggregation-transfer-backend": decode.transfer_backend}
    prefill = server_flags(scenario, variant) | backend
    prefill |= {"disaggregation-mode": "prefill", "disaggregation-bootstrap-port": bootstrap}
    plain = ServedVariant(kind="single", flags={"tp-size": decode.ranks, **decode.flags})
    other = server_flags(scenario, plain) | backend | {"disaggregation-mode": "decode"}
    if scenario.gpus > 1:  # on the GPUs after those that prefill
        other.setdefault("base-gpu-id", scenario.ranks)
    return prefill, other


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """`{"tp-size": 2, "enable-dwdp": True}` as `--tp-size 2 --enable-dwdp`; False leaves a flag out."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *map(str, values)]
    return arguments


def server_command(model: str, port: int, flags: Mapping[str, Any]) -> list[str]:
    """`python -m sglang.launch_server …`."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    return [*command, "--host", "127.0.0.1", "--port", str(port), *as_arguments(flags)]


def router_command(prefill: str, bootstrap_port: int, decode: str, port: int) -> list[str]:
    """SGLang's mini load balancer in front of one prefill and one decode server, given by their URLs."""
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--mini-lb"]
    command += ["--prefill", prefill, str(bootstrap_port), "--decode", decode]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


def wait_healthy(process: Process, url: str, timeout_s: float) -> None:
    """Return when `url` answers GET /health.

    Raises:
        RunError: The process ended, or did not answer within `timeout_s` of its start.
    """
    while True:
        process.check_alive()
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        if time.monotonic() - process.started > timeout_s:
            why = f"{reason(process.log)} (log: {process.log})"
            raise RunError(f"{process.name} did not answer within {timeout_s:g} s: {why}")
        time.sleep(_POLL_S)


class Deployment:
    """Where requests go, and the processes behind it.

    Attributes:
        url: For clients.
        server_url: Of the server whose ranks are asked; behind a router, the prefill server.
        routed: Whether a router is in front.
    """

    def __init__(self, url: str, server_url: str, processes: Mapping[str, Process]) -> None:
        self.url, self.server_url = url, server_url
        self.routed = url != server_url
        self._processes = dict(processes)

    def wait(self, timeout_s: float) -> float:
        """Return when every process answers; seconds since the first was started.

        Raises:
            RunError: A process ended, or did not answer in time.
        """
        for url, process in self._processes.items():
            wait_healthy(process, url, timeout_s)
        return time.monotonic() - min(process.started for process in self._processes.values())

    def untuned(self) -> str:
        """As `Process.untuned`, of all."""
        return "; ".join(filter(None, (process.untuned() for process in self._processes.values())))

    def check_alive(self) -> None:
        """Look whether all processes run.

        Raises:
            RunError: One has ended.
        """
        for process in self._processes.values():
            process.check_alive()

    def answers(self, prompts: list[list[int]], new_tokens: int, ranks: int) -> list[list[list[int]]]:
        """Greedy tokens `[ranks][prompts][new_tokens]`, one prompt at a time; behind a router of any rank.

        Raises:
            RunError: A request failed.
        """
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        one_rank = self.routed or ranks == 1
        where: list[dict[str, Any]] = [{}] if one_rank else [{"routed_dp_rank": rank} for rank in range(ranks)]
        found: list[list[list[int]]] = []
        for rank in where:
            found.append([])
            for prompt in prompts:
                body = {"input_ids": prompt, "sampling_params": sampling, **rank}
                try:
                    answer = requests.post(f"{self.url}/generate", json=body, timeout=300)
                    answer.raise_for_status()
                except requests.RequestException as error:
                    raise RunError(f"a prompt of {len(prompt)} tokens got no answer: {error}") from None
                found[-1].append(answer.json()["output_ids"])
        return found

    def reports(self) -> list[dict[str, Any]]:
        """Every rank's DWDP counters, in rank order; empty where the server has none."""
        with contextlib.suppress(requests.RequestException, ValueError):
            states = requests.get(f"{self.server_url}/server_info", timeout=30).json().get("internal_states", [])
            return [state["dwdp"] for state in sorted(states, key=rank_of) if state.get("dwdp")]
        return []


@contextlib.contextmanager
def start(scenario: Scenario, name: str, model: str, logs: Path) -> Iterator[Deployment]:
    """A variant whose processes have been started, in time to be waited for; stopped in the end, whatever happens.

    Raises:
        RunError: A process could not be started.
    """
    variant = scenario.variants[name]
    with tempfile.TemporaryDirectory(prefix="compare-serving-") as directory, contextlib.ExitStack() as stack:
        variables = environment(
            variant.kind,
            ranks=scenario.ranks,
            devices=scenario.gpus,
            several=scenario.together > 1,
            made=bool(scenario.model.make),
            folder=Path(directory),
            base=os.environ,
        )
        if variant.decode is not None:  # both servers are on this host, which need not have a network
            variables.setdefault("SGLANG_HOST_IP", "127.0.0.1")
        variables |= scenario.environment | variant.environment
        processes: dict[str, Process] = {}

        def begin(role: str, command: list[str], at: int) -> str:
            url = f"http://127.0.0.1:{at}"
            full = f"{name}-{role}" if role else name
            processes[url] = Process(full, command, variables, logs / f"{full}.log")
            stack.callback(processes[url].stop)
            return url

        front = free_port()
        if variant.decode is None:
            url = begin("", server_command(model, front, server_flags(scenario, variant)), front)
            deployment = Deployment(url, url, processes)
        else:
            bootstrap, prefill_port, decode_port = free_port(), free_port(), free_port()
            flags = split_flags(scenario, variant, bootstrap)
            prefill = begin("prefill", server_command(model, prefill_port, flags[0]), prefill_port)
            decode = begin("decode", server_command(model, decode_port, flags[1]), decode_port)
            url = begin("router", router_command(prefill, bootstrap, decode, front), front)
            deployment = Deployment(url, prefill, processes)
        yield deployment
        for process in processes.values():  # together, since each takes a while
            process.ask_to_stop()
