"""A prefill server with DWDP, a plain decode server, and SGLang's mini load balancer in front; the KV cache and drafts
cross."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from benchmarks.processes import Process
from benchmarks.serving.servers import router_command, wait_healthy
from sglang_dwdp.demo.server import Server, free_port
from tests.e2e.conftest import FLAGS, Answers, Footprint, Plugin, Reference
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.e2e.test_drafts import NEW_TOKENS, STEPS
from tests.e2e.test_parity import MLA_PLUGIN
from tests.fixtures import cpu_drafts
from tests.fixtures.families import Family, make_checkpoint
from tests.fixtures.model_modules import FEWER_MODELS
from tests.fixtures.reference import greedy_tokens

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


@contextmanager
def disaggregated(
    model: Path, directory: Path, environment: Mapping[str, str], *flags: str
) -> Iterator[tuple[Server, str]]:
    """A prefill server of two DWDP ranks and a decode server of one rank behind a router.

    Args:
        model: Folder of the checkpoint.
        directory: For logs and temporary files.
        environment: Variables to add for both servers.
        *flags: Further command-line arguments of both.

    Yields:
        The prefill server, and the router's URL.
    """
    pytest.importorskip("nixl", reason="the KV cache is sent by NIXL: pip install -e '.[dev]'")
    pytest.importorskip("sglang_router", reason="the router: pip install -e '.[dev]'")
    bootstrap, router_port = free_port(), free_port()
    # SGLang looks for the host's address in its network, and there need not be one.
    environment = {**FEWER_MODELS, **environment, "OMP_NUM_THREADS": "1", "SGLANG_HOST_IP": "127.0.0.1"}

    def server(role: str, ranks: int, dwdp: tuple[str, ...] | None, *more: str) -> Server:
        roles = ("--disaggregation-mode", role, "--disaggregation-transfer-backend", "nixl")
        folder = directory / role
        folder.mkdir()
        return Server(
            model,
            ranks,
            folder / "log",
            dwdp=dwdp,
            flags=(*FLAGS, *roles, *flags, *more),
            environment={**environment, "TMPDIR": str(folder)},
        )

    # With overlap, chunks are sent early, after a CUDA event: not on the CPU engine.
    options = (
        "--disable-overlap-schedule",
        "--chunked-prefill-size",
        str(CHUNK),
        "--disaggregation-bootstrap-port",
        str(bootstrap),
    )
    footprint = Footprint(directory / "prefill")
    prefill = server("prefill", 2, ("--dwdp-audit", "--dwdp-direct-max-tokens", "64"), *options)
    # SGLang's default keeps pinned host memory for retracted requests, which takes a CUDA driver.
    decode = server("decode", 1, None, "--disaggregation-decode-retraction-backup", "cpu_tensor")
    router: Process | None = None
    try:
        prefill.wait()
        decode.wait()
        url = f"http://127.0.0.1:{router_port}"
        command = router_command(prefill.url, bootstrap, decode.url, router_port)
        router = Process("the router", command, dict(os.environ), directory / "router.log")
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


def ask(url: str, prompt: str, new_tokens: int = MAX_NEW_TOKENS) -> dict[str, Any]:
    """The answer to a prompt."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens}
    answer = requests.post(f"{url}/generate", json={"text": prompt, "sampling_params": sampling}, timeout=90)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.serving
def test_prefill_with_dwdp(
    models: Callable[[Family, int], Path], reference: Reference, plugin: Plugin, tmp_path: Path
) -> None:
    expected = reference("qwen3_moe", 9)
    with disaggregated(models("qwen3_moe", 9), tmp_path, plugin("nixl_on_cpu", HOST_MEMORY)) as (prefill, url):
        check_prefills(prefill, url, expected)


def check_prefills(prefill: Server, url: str, expected: Answers) -> None:
    """Requests go to ranks by their tokens, and are answered with the expected ones."""
    info = requests.get(f"{prefill.url}/server_info", timeout=30).json()
    assert info["chunked_prefill_size"] == CHUNK  # a rank's, as given
    assert info["load_balance_method"] == "total_tokens"
    assert ask(url, PROMPTS[3])["output_ids"] == expected[3]

    # Long and short prompts by turns: by count, one of two ranks would get all long ones, 89 % of the tokens.
    before = [report["forward_tokens"] for report in prefill.reports()]
    numbers = [number for pair in zip(range(15, 7, -1), range(8), strict=True) for number in pair]
    with ThreadPoolExecutor(len(numbers)) as pool:
        waiting = []
        for number in numbers:
            waiting.append(pool.submit(ask, url, PROMPTS[number]))
            time.sleep(0.02)  # so that they arrive in this order
        answers = [answer.result()["output_ids"] for answer in waiting]
    assert answers == [expected[number] for number in numbers]
    reports = prefill.reports()
    tokens = [report["forward_tokens"] - first for report, first in zip(reports, before, strict=True)]
    assert max(tokens) < 0.75 * sum(tokens)
    assert all(report["staged_forwards"] > 0 for report in reports)


@pytest.mark.models
def test_prefill_with_drafts(plugin: Plugin, tmp_path: Path) -> None:
    """The draft layer runs in prefills, and the decode server accepts as many drafts as one that does both."""
    model, plain = tmp_path / "model", tmp_path / "plain"
    make_checkpoint(model, "deepseek_v3", dtype=torch.float32, draftable=1, draft_layers=1)
    make_checkpoint(plain, "deepseek_v3", dtype=torch.float32, draftable=1)  # transformers has no draft layers
    tokens = greedy_tokens(plain, PROMPTS, NEW_TOKENS)
    environment = plugin("nixl_on_cpu", HOST_MEMORY)
    environment = plugin("cpu_drafts", Path(cpu_drafts.__file__).read_text(), environment)
    environment = plugin("mla_on_cpu", MLA_PLUGIN, environment)
    flags = ("--speculative-algorithm", "NEXTN", *STEPS, "--disable-shared-experts-fusion")

    def answers(url: str) -> list[tuple[list[int], int]]:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda prompt: ask(url, prompt, NEW_TOKENS), PROMPTS))
        return [(answer["output_ids"], answer["meta_info"]["spec_verify_ct"]) for answer in found]

    with Server(model, 1, tmp_path / "log", flags=(*FLAGS, *flags), environment=FEWER_MODELS | environment) as server:
        server.wait()
        expected = answers(server.url)
    assert [got for got, _ in expected] == tokens
    assert sum(steps for _, steps in expected) < 0.9 * NEW_TOKENS * len(PROMPTS)

    with disaggregated(model, tmp_path, environment, *flags) as (prefill, url):
        assert answers(url) == expected
        for report in prefill.reports():
            assert report["moe_layers"] == 4  # 3 and the draft layer's
            assert min(report[k] for k in ("bytes_copied", "direct_forwards", "staged_forwards")) > 0
