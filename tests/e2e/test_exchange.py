"""--dwdp-exchange on real servers: forwards that ranks run together, and idle ranks that help."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from sglang_dwdp.counters import METRICS
from sglang_dwdp.demo.server import Server
from tests.e2e.conftest import Answers, Plugin, Reference, Running
from tests.e2e.load import RETRY, RIGHT, Load, rank_process
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family

# On the CPU engine a joint forward fails at once. On GPUs it is known later, as here: of a middle chunk, once.
VOID = """
import os, sys

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", patched, HookType.AROUND)

def patched(original, *args, **kwargs):
    from sglang_dwdp.errors import DwdpRuntimeError
    from sglang_dwdp.srt_patches.exchange_steps import ExchangeSteps
    wait = ExchangeSteps.wait

    def fail(steps):
        wait(steps)
        batch, file = sys._getframe(1).f_locals.get("batch"), os.environ["VOID_CHUNK"]  # none in the first forward
        if batch and any(request.inflight_middle_chunks for request in batch.reqs) and os.path.exists(file):
            os.unlink(file)
            raise DwdpRuntimeError("rank 1 has left.")

    ExchangeSteps.wait = fail
    return original(*args, **kwargs)
"""
ROUNDS = ("joint_rounds", "helped_rounds", "alone_rounds", "withdrawn_rounds")
HELP_S = 180.0  # on a host that runs other tests as well


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_decode_together(
    running: Running, models: Callable[[Family, int], Path], reference: Reference, ranks: int
) -> None:
    """The tokens are those of one rank: in float32 no two best tokens of these prompts are close."""
    expected = reference("qwen3_moe", 8)
    flags = ("--enable-metrics", "--decode-log-interval", "5", "--chunked-prefill-size", "600")
    flags += ("--max-running-requests", str(6 * ranks))
    options: dict[str, Any] = {"dwdp": ("--dwdp-exchange", "auto"), "flags": flags}
    options["environment"] = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}
    with running(models("qwen3_moe", 8), ranks, **options) as server:

        def ask(number: int, rank: int) -> bool:
            return server.generate(PROMPTS[number], MAX_NEW_TOKENS, rank) == expected[number]

        # Different loads: rank 0 decodes three prompts at a time, the others one.
        numbers = [number for number in range(len(PROMPTS)) for _ in range(ranks + 2)]
        places = [place % (ranks + 2) for place in range(len(numbers))]
        with ThreadPoolExecutor(ranks + 2) as pool:
            assert all(pool.map(ask, numbers, [max(place - 2, 0) for place in places]))
        loaded = server.reports()
        assert all(report["joint_rounds"] > 0 for report in loaded)
        # The others are idle, and help with most steps of rank 0, if they get a core: where one is late, the next waits
        # are put off for most of a second.
        deadline = time.monotonic() + HELP_S
        while True:
            before = server.reports()
            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(ask, range(4), [0] * 4))
            first, *others = (
                {name: after[name] - old[name] for name in ROUNDS}
                for old, after in zip(before, server.reports(), strict=True)
            )
            assert all(other["joint_rounds"] == 0 for other in others)
            if first["joint_rounds"] > first["alone_rounds"] + first["withdrawn_rounds"]:
                assert all(other["helped_rounds"] == first["joint_rounds"] for other in others)
                break
            assert time.monotonic() < deadline, f"idle ranks helped with few steps: {first}"
            time.sleep(0.7)
        check_short_prefills(server)
        check_metrics(server)
        check_under_pressure(server, expected)
        assert not any(report["joint_rounds_ended"] for report in server.reports())
        if ranks == 3:
            check_survivors(server, expected)


def check_short_prefills(server: Server) -> None:
    """A short prompt is run with the help of idle ranks. A forward that ends with its first token is no decode."""
    deadline, after = time.monotonic() + HELP_S, server.reports()[0]
    while time.monotonic() < deadline:
        before = after
        server.generate(f"{before['forward_tokens']} {PROMPTS[12]}", 1, 0)
        after = server.reports()[0]
        if after["exchanged_rows"] > before["exchanged_rows"] + 100:
            assert after["joint_rounds"] > before["joint_rounds"]
            return
        time.sleep(0.7)
    raise AssertionError("no short prefill was joint")


def check_under_pressure(server: Server, expected: Answers) -> None:
    """Prompts in chunks, more requests than may run at a time, some that are retracted and some that are aborted."""
    before = server.reports()
    with ThreadPoolExecutor(40) as pool:
        answers = [
            pool.submit(server.generate, PROMPTS[number], MAX_NEW_TOKENS, rank)
            for number in range(len(PROMPTS))
            for rank in range(server.ranks)
        ]
        for number in range(8):
            body = {"text": PROMPTS[number], "rid": f"aborted-{number}", "routed_dp_rank": number % server.ranks}
            sampling = {"sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
            pool.submit(requests.post, f"{server.url}/generate", json=body | sampling, timeout=300)
        for number in range(8):
            time.sleep(0.1)
            requests.post(f"{server.url}/abort_request", json={"rid": f"aborted-{number}"}, timeout=30)
        wanted = [expected[number] for number in range(len(PROMPTS)) for _ in range(server.ranks)]
        assert [answer.result() for answer in answers] == wanted
    for report, earlier in zip(server.reports(), before, strict=True):
        assert report["joint_rounds"] > earlier["joint_rounds"]
    assert re.search(r"Testing retraction\. #retracted_reqs: [1-9]", server.log.read_text(errors="replace"))


def check_survivors(server: Server, expected: Answers) -> None:
    """A rank is killed while all decode together: the others answer on, each alone."""
    with Load(server, expected) as load:
        time.sleep(5)
        rank_process(server, 1).kill()
        time.sleep(5)
    assert {answer.what for answer in load.answers} <= {RIGHT, RETRY}
    assert sum(answer.what == RETRY for answer in load.answers) <= 8
    assert {answer.rank for answer in load.answers[-20:]} == {0, 2}
    assert all(report["joint_rounds_ended"] for report in server.reports())


def check_metrics(server: Server) -> None:
    """/metrics has every rank's counters, under DWDP's and SGLang's labels, as they were a moment ago."""
    for number in range(8 * server.ranks):  # too long to be joint
        server.generate(f"{number} {PROMPTS[14]} {PROMPTS[15]}", 1, number % server.ranks)
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    samples = {
        (sample.name, int(sample.labels["dp_rank"]), sample.labels.get("kind", sample.labels.get("outcome"))): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("sglang:dwdp_") and "dp_rank" in sample.labels and "le" not in sample.labels
    }
    names = {f"sglang:{metric.name}" for metric in METRICS}
    assert names <= {name for name, _, _ in samples}
    reports = server.reports()
    for (name, rank, value), sample in samples.items():
        assert {"model_name", "engine_type", "tp_rank", "pp_rank"} <= sample.labels.keys()
        for metric in METRICS:
            if name == f"sglang:{metric.name}":
                now = reports[rank][metric.keys[value or ""]] * metric.unit
                # What ran after SGLang published last is still to come.
                assert 0 <= sample.value <= now + 1e-9, name
    for rank in range(server.ranks):
        for kind in ("staged", "joint"):
            exported = samples["sglang:dwdp_forwards_total", rank, kind].value
            assert exported >= 0.8 * reports[rank][f"{kind}_forwards"] > 0
        assert samples["sglang:dwdp_copy_wait_seconds_count", rank, None].value > 0
        assert samples["sglang:dwdp_setup_seconds", rank, None].value == pytest.approx(reports[rank]["setup_s"])
    line = r"Decode batch, .* dwdp: [1-9]\d* joint, \d+ direct, \d+ staged, [\d.]+ ms waited, "
    assert re.search(line, server.log.read_text(errors="replace"))


def test_a_prompt_with_a_void_chunk_ends_and_is_not_cached(
    running: Running, models: Callable[[Family, int], Path], reference: Reference, plugin: Plugin, tmp_path: Path
) -> None:
    expected, void = reference("qwen3_moe", 8), tmp_path / "void"
    options: dict[str, Any] = {"dwdp": ("--dwdp-exchange", "auto"), "flags": ("--chunked-prefill-size", "128")}
    options["environment"] = {**plugin("void_chunk", VOID), "VOID_CHUNK": str(void)}
    with running(models("qwen3_moe", 8), 2, **options) as server:
        for number in (12, 15):  # when it is known, the last chunk is under way, or others are to come
            sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
            body = {"text": PROMPTS[number], "sampling_params": sampling, "routed_dp_rank": 0}
            void.touch()
            answer = requests.post(f"{server.url}/generate", json=body, timeout=300)
            assert answer.status_code == 503
            assert "rank 1 has left. Send the request again." in answer.text
            cached = []
            for _ in range(2):
                again = server.post("/generate", body)
                assert again["output_ids"] == expected[number]
                cached.append(again["meta_info"]["cached_tokens"])
            assert cached[0] == 0 < cached[1]
