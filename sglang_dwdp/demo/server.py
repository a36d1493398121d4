"""Starting a real SGLang server, by default on the CPU engine, watching it come up, and stopping it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import requests

from sglang_dwdp.cpu import engine as cpu_engine
from sglang_dwdp.errors import DwdpError

# A folder of packages that need not be imported; not a package itself.
STUBS = Path(__file__).resolve().parent / "stubs"
# Below the range from which the system hands out ports by itself, and those that servers take for themselves.
# Tests that run beside each other divide it.
PORTS = range(10000, 20000)
_LAST_LINES = 60  # of a log: what ended a server comes before what its other processes make of that


class ServerFailed(DwdpError):
    """A server ended, or did not come up in time; the message has the end of its log."""


class Server:
    """`python -m sglang.launch_server` in a process group of its own, and its log.

    The context manager stops the server, by force after a while if need be.

    Args:
        model: folder of the checkpoint.
        ranks: of the server, each with its own attention.
        log: file for all that the server writes.
        dwdp: the options of DWDP as command-line arguments; None for a plain server.
        flags: further command-line arguments.
        environment: variables to add.
        device: "cpu" for the CPU engine, which brings its own flags; "cuda" for a GPU for each rank.
    """

    def __init__(
        self,
        model: Path,
        ranks: int,
        log: Path,
        *,
        dwdp: Sequence[str] | None = None,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.log, self.ranks, self.port = log, ranks, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--tp", str(ranks)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *flags]
        variables = {**fewer_models(), **os.environ, **(environment or {})}
        if device == "cpu":
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(STUBS), variables.get("PYTHONPATH"))))
            if dwdp is None:
                # What the plugin arranges by itself where DWDP is on.
                variables |= cpu_engine.environment(ranks, variables)
                for name, value in cpu_engine.default_flags().items():
                    command += ["--" + name.replace("_", "-"), str(value)]
                command += ["--sleep-on-idle"]
            else:
                variables["SGLANG_USE_CPU_ENGINE"] = "1"
                command += ["--device", "cpu"]
        if dwdp is not None:
            command += ["--enable-dwdp", *dwdp]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )

    def wait(self, timeout_s: float = 300.0) -> None:
        """Return when the server answers.

        Args:
            timeout_s: after which this fails.

        Raises:
            ServerFailed: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"the server ended with exit code {self.process.returncode}:\n{self.log_end()}")
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise ServerFailed(f"the server did not answer within {timeout_s:g} s:\n{self.log_end()}")

    def log_end(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = 120.0) -> Any:
        """The JSON answer to a POST.

        Raises:
            requests.HTTPError: the server answered with an error.
        """
        answer = requests.post(self.url + path, json=body, timeout=timeout_s)
        answer.raise_for_status()
        return answer.json()

    def generate(self, text: str, max_new_tokens: int, rank: int | None = None) -> list[int]:
        """Greedy tokens after `text`, on a rank of choice."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
        body: dict[str, Any] = {"text": text, "sampling_params": sampling}
        if rank is not None and self.ranks > 1:
            body["routed_dp_rank"] = rank
        tokens: list[int] = self.post("/generate", body)["output_ids"]
        return tokens

    def reports(self) -> list[dict[str, Any]]:
        """Every rank's DWDP counters, in rank order."""
        states = requests.get(f"{self.url}/server_info", timeout=30).json()["internal_states"]
        return [state["dwdp"] for state in sorted(states, key=rank_of)]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask the server to end and wait for it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """End whatever is left of the server's process group. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()


def fewer_models(modules: Collection[str] = ("qwen3_moe",)) -> dict[str, str]:
    """The variable that keeps SGLang from importing modules of `srt.models` other than these: the demo's by default.

    Each process of a server imports all of them otherwise, which takes longer than everything else at its start.
    """
    spec = importlib.util.find_spec("sglang")
    names = {path.stem for path in Path(spec.origin).parent.glob("srt/models/*.py")} if spec and spec.origin else set()
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted(names.difference(modules, ("__init__",))))}


def rank_of(state: Mapping[str, Any]) -> tuple[int, int]:
    """Group and rank of a state in /server_info, where SGLang lists ranks in the order of their answers."""
    report = state.get("dwdp") or {}
    return report.get("group", 0), report.get("rank", 0)


def free_port() -> int:
    """A port of `PORTS` that is free now.

    With attention data parallelism SGLang takes ports some hundreds above as well.
    """
    for _ in range(100):
        port = random.choice(PORTS)
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise ServerFailed(f"no free port between {PORTS.start} and {PORTS.stop}")
