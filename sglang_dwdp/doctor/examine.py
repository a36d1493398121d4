"""Gathers the facts of this machine."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sglang_dwdp.config import transports_of
from sglang_dwdp.cpu import engine as cpu_engine
from sglang_dwdp.doctor.facts import Copy, Facts, Gpu, Kernels, Share
from sglang_dwdp.doctor.probes import EXCHANGE_S, MARK
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.conflicts import check_environment
from sglang_dwdp.support.ledger import ALLOW_PATCHED
from sglang_dwdp.support.release import check_release

_LIMIT_S = 3 * EXCHANGE_S  # SGLang's imports, or a trial whose peers do not come


def examine() -> Facts:
    """All facts. Takes half a minute, most of it to import SGLang."""
    found, software = run_probes([["gpus"], ["software"]])
    count = len(found.get("gpus", ()))
    try:
        sglang = version("sglang")
    except PackageNotFoundError:
        sglang = None
    return Facts(
        sglang=sglang,
        release_error=_error_of(check_release),
        changed=software.get("changed"),
        allow_patched=os.environ.get(ALLOW_PATCHED) == "1",
        kernels=Kernels(**software["kernels"]) if "kernels" in software else None,
        driver=found.get("driver"),
        driver_cuda=found.get("driver_cuda"),
        torch_cuda=found.get("torch_cuda"),
        gpus=[Gpu(**gpu) for gpu in found["gpus"]] if "gpus" in found else None,
        no_peer_access=found.get("no_peer_access", ()),
        shares=[try_transport(one, count) for one in (transports_of("cuda") if count else transports_of("cpu")[:1])],
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        shm_bytes=_shm_bytes(),
        seccomp=_seccomp(),
        is_container=any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        environment_error=_error_of(lambda: check_environment(os.environ)),
        failed={name: one["error"] for name, one in (("GPUs", found), ("software", software)) if "error" in one},
    )


def try_transport(transport: str, gpu_count: int) -> Share:
    """Share memory between processes of a GPU each; two processes where there is one GPU, or none."""
    group, size = uuid.uuid4().hex, max(gpu_count, 2)
    answers = run_probes([["share", transport, str(rank), str(size), str(gpu_count), group] for rank in range(size)])
    failed = sorted((one for one in answers if "error" in one), key=lambda one: bool(one.get("is_peers")))
    copies = [Copy(**copy) for answer in answers for copy in answer.get("copies", ())]
    return Share(transport, failed[0]["error"] if failed else "", copies)


def run_probes(commands: Sequence[Sequence[str]], limit_s: float = _LIMIT_S) -> list[dict[str, Any]]:
    """The answers of probes that run side by side; one with the key `error` where a probe failed.

    Args:
        commands: the name and the arguments of each.
        limit_s: seconds after which those that have not ended are killed.
    """
    variables = dict(os.environ)
    if not cpu_engine.has_cuda_driver():  # SGLang's kernels can be imported nonetheless
        variables |= cpu_engine.environment(1)
    with ExitStack() as stack:
        started = []
        for command in commands:
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            program = [sys.executable, "-m", "sglang_dwdp.doctor.probes", *command]
            process = subprocess.Popen(program, env=variables, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append((process, output))
        deadline = time.monotonic() + limit_s
        answers = []
        for process, output in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            output.seek(0)
            answers.append(_answer(output.read(), process.poll()))
        return answers


def _answer(output: str, code: int | None) -> dict[str, Any]:
    before, mark, text = output.rpartition(MARK)
    if mark and code is not None:
        answer: dict[str, Any] = json.loads(text.splitlines()[0])
        return answer
    last = ((before + text).strip().splitlines() or ["it said nothing"])[-1]
    return {"error": "no answer in time" if code is None else f"its process ended with code {code}: {last}"}


def _error_of(check: Callable[[], None]) -> str:
    try:
        check()
    except DwdpConfigError as error:
        return str(error)
    return ""


def _shm_bytes() -> int:
    with suppress(OSError):
        file_system = os.statvfs("/dev/shm")
        return file_system.f_frsize * file_system.f_blocks
    return 0


def _seccomp() -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Seccomp:")).split()[1])
    return None
