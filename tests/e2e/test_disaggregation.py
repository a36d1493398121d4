"""A prefill server with DWDP, a plain decode server, and SGLang's mini load balancer in front; the KV cache crosses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from benchmarks.processes import Process
from benchmarks.serving.servers import router_command, wait_healthy
from sglang_dwdp.demo.server import Server, free_port
from tests.e2e.conftest import FLAGS, Answers, Footprint, Plugin, Reference
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family

CHUNK = 128

# On the CPU engine SGLang tells NIXL that the KV cache is GPU memory.
HOST_MEMORY = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.disaggregation.nixl.conn._normalize_kv_mem_kinds",
        lambda _kinds, count: ["DRAM"] * count,
        HookType.REPLACE,
    )
"""


@pytest.fixture
def expected(reference: Reference) -> Answers:
    return reference("qwen3_moe", 9)


@pytest.fixture
def group(
    expected: Answers,
    models: Callable[[Family, int], Path],
    plugin: Plugin,
    tmp_path: Path,
) -> Iterator[tuple[Server, str]]:
    """The prefill server, and the router's URL."""
    pytest.importorskip("nixl", reason="the KV cache is sent by NIXL: pip install -e '.[dev]'")
    pytest.importorskip("sglang_router", reason="the router: pip install -e '.[dev]'")
    model, bootstrap, router_port = models("qwen3_moe", 9), free_port(), free_port()
    # SGLang looks for the host's address in its network, and there need not be one.
    environment = plugin("nixl_on_cpu", HOST_MEMORY) | {"OMP_NUM_THREADS": "1", "SGLANG_HOST_IP": "127.0.0.1"}

    def server(role: str, ranks: int, dwdp: tuple[str, ...] | None, *flags: str) -> Server:
        roles = ("--disaggregation-mode", role, "--disaggregation-transfer-backend", "nixl")
        folder = tmp_path / role
        folder.mkdir()
        variables = environment | {"TMPDIR": str(folder)}
        return Server(model, ranks, folder / "log", dwdp=dwdp, flags=(*FLAGS, *roles, *flags), environment=variables)

    # With overlap, chunks are sent early, after a CUDA event: not on the CPU engine.
    options = (
        "--disable-overlap-schedule",
        "--chunked-prefill-size",
        str(CHUNK),
        "--disaggregation-bootstrap-port",
        str(bootstrap),
    )
    footprint = Footprint(tmp_path / "prefill")
    prefill = server("prefill", 2, ("--dwdp-audit", "--dwdp-direct-max-tokens", "64"), *options)
    # SGLang's default keeps pinned host memory for retracted requests, which takes a CUDA driver.
    decode = server("decode", 1, None, "--disaggregation-decode-retraction-backup", "cpu_tensor")
    router: Process | None = None
    try:
        prefill.wait()
        decode.wait()
        url = f"http://127.0.0.1:{router_port}"
        command = router_command(prefill.url, bootstrap, decode.url, router_port)
        router = Process("the router", command, dict(os.environ), tmp_path / "router.log")
        wait_healthy(router, url, 120)
        yield prefill, url
        router.stop()
        prefill.stop()
        assert footprint.left() == set()
        decode.stop()
    finally:
        for server in (prefill, decode):
            server.kill()
        if router is not None:
            router.stop(0)


@pytest.mark.serving
def test_prefill_with_dwdp(group: tuple[Server, str], expected: Answers) -> None:
    prefill, url = group

    def ask(number: int) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
        answer = requests.post(
            f"{url}/generate", json={"text": PROMPTS[number], "sampling_params": sampling}, timeout=90
        )
        answer.raise_for_status()
        tokens: list[int] = answer.json()["output_ids"]
        return tokens

    info = requests.get(f"{prefill.url}/server_info", timeout=30).json()
    assert info["chunked_prefill_size"] == CHUNK  # a rank's, as given
    assert info["load_balance_method"] == "total_tokens"
    assert ask(3) == expected[3]

    # Long and short prompts by turns: by count, one of two ranks would get all long ones, 89 % of the tokens.
    before = [report["forward_tokens"] for report in prefill.reports()]
    numbers = [number for pair in zip(range(15, 7, -1), range(8), strict=True) for number in pair]
    with ThreadPoolExecutor(len(numbers)) as pool:
        waiting = []
        for number in numbers:
            waiting.append(pool.submit(ask, number))
            time.sleep(0.02)  # so that they arrive in this order
        answers = [answer.result() for answer in waiting]
    assert answers == [expected[number] for number in numbers]
    reports = prefill.reports()
    tokens = [report["forward_tokens"] - first for report, first in zip(reports, before, strict=True)]
    assert max(tokens) < 0.75 * sum(tokens)
    assert all(report["staged_forwards"] > 0 for report in reports)
