"""Starting in other ways than tests elsewhere do, and not starting."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_dwdp.demo.server import Server, ServerFailed, fewer_models, free_port
from tests.e2e.conftest import Footprint, Plugin, Reference
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.environment import plain_environment
from tests.fixtures.families import Family, make_checkpoint
from tests.fixtures.reference import greedy_tokens

Models = Callable[[Family, int], Path]

BREAKER = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def take_away(*args, role, **kwargs):
        if role == "scheduler":
            from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
            del FusedMoE._map_global_expert_id_to_local_expert_id

    HookRegistry.register("sglang.srt.runtime_context.publish", take_away, HookType.BEFORE)
"""

GATHERER = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def gather(*args, **kwargs):
        from sglang.srt.runtime_context import get_parallel
        get_parallel().tp_group.all_gather_object(0)

    HookRegistry.register("sglang.srt.models.qwen3_moe.Qwen3MoeDecoderLayer.forward", gather, HookType.BEFORE)
"""

ENGINE = """
import asyncio, json, sys
from sglang_dwdp.cpu import engine as cpu_engine
import fastapi, psutil, sglang

cpu_engine.arrange(2)  # needed where there is no CUDA driver

async def lose_rank_1(engine, prompt):
    long = {"max_new_tokens": 1000, "ignore_eos": True}
    stream = await engine.async_generate(prompt, long, routed_dp_rank=1, stream=True)
    await anext(stream)
    waiting = asyncio.ensure_future(engine.async_generate(prompt, long, routed_dp_rank=1))
    await anext(stream)
    [rank] = [child for child in psutil.Process().children(recursive=True) if child.name().endswith("TP1")]
    rank.kill()
    chunks = [chunk async for chunk in stream]
    return chunks[-1]["meta_info"]["finish_reason"], await failure(waiting)

async def failure(request):
    try:
        return await request
    except fastapi.HTTPException as error:
        return [error.status_code, error.detail]

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", tp_size=2, enable_dwdp=True, dwdp_view="staged", dwdp_depth=1,
        dtype="float32", skip_server_warmup=True,
    )
    prompts = json.load(open(sys.argv[2]))
    answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": int(sys.argv[3])})
    reports = [state["dwdp"] for state in engine.get_server_info()["internal_states"]]
    try:
        engine.save_sharded_model(path="nowhere")
    except AssertionError as error:
        message = str(error)
    from pathlib import Path
    from safetensors.torch import load_file

    engine.begin_weight_update()
    for file in Path(sys.argv[4]).glob("*.safetensors"):
        assert engine.update_weights_from_tensor(list(load_file(file).items()))[0]
    updated = engine.end_weight_update()
    others = engine.generate(prompts, {"temperature": 0, "max_new_tokens": int(sys.argv[3])})
    lost = [*engine.loop.run_until_complete(lose_rank_1(engine, prompts[0]))]
    try:
        engine.generate(prompts[0], routed_dp_rank=1)
    except fastapi.HTTPException as error:
        lost.append([error.status_code, error.detail])
    lost.append(list(engine.generate(prompts[0], routed_dp_rank=1, stream=True))[-1]["meta_info"]["finish_reason"])
    survivor = engine.generate(prompts, {"temperature": 0, "max_new_tokens": int(sys.argv[3])})
    lost.append(engine.get_server_info()["dwdp_ranks"])
    engine.shutdown()
    tokens = [[answer["output_ids"] for answer in each] for each in (answers, others, survivor)]
    print("RESULT " + json.dumps([*tokens, lost, reports, message, updated]))
"""


def shell() -> dict[str, str]:
    """What a user has who did what the README says: nothing of what tests arranged for themselves."""
    return {**fewer_models(), **plain_environment(), "SGLANG_USE_CPU_ENGINE": "1"}


def test_sglang_serve_with_a_config_file(models: Models, reference: Reference, tmp_path: Path) -> None:
    expected = reference("qwen3_moe", 8)
    model, port = models("qwen3_moe", 8), free_port()
    config = tmp_path / "server.yaml"
    config.write_text(
        f"device: cpu\ntp: 2\nport: {port}\ndtype: float32\nskip-server-warmup: true\n"
        "enable-dwdp: true\ndwdp-view: staged\ndwdp-depth: 4\n"
    )
    footprint = Footprint(tmp_path)
    server = Server.__new__(Server)
    server.log, server.ranks, server.port, server.url = tmp_path / "log", 2, port, f"http://127.0.0.1:{port}"
    with server.log.open("wb") as log:
        server.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "sglang"), "serve", str(model), "--config", str(config)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**shell(), "TMPDIR": str(tmp_path)},
            start_new_session=True,
        )
    try:
        server.wait()
        assert server.generate(PROMPTS[9], MAX_NEW_TOKENS, 1) == expected[9]
        assert [report["view"] for report in server.reports()] == ["staged", "staged"]
        assert server.reports()[1]["staged_forwards"] > 0
        server.stop(signal.SIGINT)
        assert footprint.left() == set()
    finally:
        server.kill()


def test_engine_keywords(models: Models, reference: Reference, tmp_path: Path) -> None:
    program, prompts, new = tmp_path / "program.py", tmp_path / "prompts.json", tmp_path / "new"
    program.write_text(ENGINE)
    prompts.write_text(json.dumps(PROMPTS[:6]))
    make_checkpoint(new, seed=1, dtype=torch.float32, num_experts=8)
    result = subprocess.run(
        [sys.executable, str(program), str(models("qwen3_moe", 8)), str(prompts), str(MAX_NEW_TOKENS), str(new)],
        env=shell(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stderr[-3000:]
    tokens, others, survivor, lost, reports, message, updated = json.loads(lines[0].removeprefix("RESULT "))
    assert tokens == reference("qwen3_moe", 8)[:6]
    assert updated[0], updated
    assert others == greedy_tokens(new, PROMPTS[:6], MAX_NEW_TOKENS)
    chunk, exception, named, named_chunk, ranks = lost
    assert survivor == others
    assert (chunk["type"], chunk["status_code"], exception[0]) == ("abort", 503, 503)
    assert chunk["message"] == exception[1] == named[1] == named_chunk["message"]
    assert chunk["message"].startswith("DWDP: rank 1 is lost: was ended by SIGKILL")
    assert ranks.startswith("degraded: rank 1 of 2 lost at ")
    assert all(report["view"] == "staged" and report["bytes_copied"] > 0 for report in reports)
    assert message.startswith("save_sharded_model: Saving or sending a running server's weights is unsupported")


def test_a_hook_that_does_not_take_stops_the_server(models: Models, plugin: Plugin, tmp_path: Path) -> None:
    """Also one that may have changed, as the user insists."""
    environment = {**plugin("breaker", BREAKER), "SGLANG_DWDP_ALLOW_PATCHED": "1"}
    server = Server(models("qwen3_moe", 8), 2, tmp_path / "log", dwdp=(), environment=environment)
    try:
        with pytest.raises(ServerFailed, match="the server ended with exit code"):
            server.wait()
    finally:
        server.kill()
    log = server.log.read_text()
    assert "SGLANG_DWDP_ALLOW_PATCHED=1 allows it" in log
    assert "these parts of SGLang could not be hooked" in log
    assert "FusedMoE._map_global_expert_id_to_local_expert_id" in log


def test_a_model_that_cannot_run_a_forward_stops_the_server(
    models: Models, plugin: Callable[[str, str], dict[str, str]], tmp_path: Path
) -> None:
    """Without any request."""
    flags = ("--skip-server-warmup",)
    environment = plugin("gatherer", GATHERER)
    server = Server(models("qwen3_moe", 8), 2, tmp_path / "log", dwdp=(), flags=flags, environment=environment)
    try:
        with pytest.raises(ServerFailed, match="the server ended with exit code"):
            server.wait(120)
    finally:
        server.kill()
    assert "DwdpRuntimeError: all_gather_object over 2 ranks was called in a forward" in server.log.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--enable-eplb",), "EPLB"),
        (("--load-format", "sharded_state"), "--load-format sharded_state"),
    ],
)
def test_a_conflict_is_one_line_and_exit_code_2(models: Models, flags: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(models("qwen3_moe", 8))]
    result = subprocess.run(
        [*command, "--device", "cpu", "--tp", "2", "--enable-dwdp", *flags],
        env=shell(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("sglang-dwdp: error:")]
    assert len(errors) == 1
    assert errors[0].startswith(f"sglang-dwdp: error: --enable-dwdp cannot be used here: {message}")
    assert "Traceback" not in result.stderr
