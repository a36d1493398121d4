"""Flags, files and keywords, and what SGLang's own resolution makes of them, in fresh install.

A process resolves server arguments once, and hooks stay, so every case here is a process of its own, or one of
many records in one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_dwdp.experts.direct_limit import direct_limit
from tests.fixtures.families import make_checkpoint
from tests.unit.support.test_conflicts import CASES

PROGRAM = """
import json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
before = dict(os.environ)
argv = json.loads(sys.argv[1])
server_args = prepare_server_args(argv)
server_args.resolve_once()
config = getattr(server_args, "_dwdp", None)
import dataclasses
from sglang.srt.runtime_context import publish
from sglang_dwdp.srt_patches import install
devices, original = [], install._install
install._install = lambda role, config, device: devices.append(device) or original(role, config, device)
publish(server_args, role="tokenizer")
import sglang.srt.managers.tokenizer_manager as tm
resolved = server_args.resolved_dict()
print("RESULT " + json.dumps({
    "config": None if config is None else dataclasses.asdict(config),
    "resolved": {k: v for k, v in resolved.items() if isinstance(v, (str, int, float, bool, type(None)))},
    "graphs": {phase: resolved["cuda_graph_config"][phase].get("backend") for phase in ("decode", "prefill")},
    "environment": sorted(k for k in os.environ if before.get(k) != os.environ[k]),
    "devices": devices,
    "hooked": hasattr(tm.TokenizerManager.get_weights_by_name, "__wrapped__"),
}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3_moe", num_experts=9, dtype=torch.float32)
    return str(path)


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def resolve(*argv: str, **environment: str) -> dict[str, Any]:
    done = run(PROGRAM, json.dumps(argv), **environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def test_without_the_flag_the_plugin_changes_nothing(model: str) -> None:
    argv = ("--model-path", model, "--device", "cpu", "--port", "21234", "--attention-backend", "torch_native")
    with_plugin = resolve(*argv)
    without = resolve(*argv, SGLANG_PLUGINS="none")
    for result in (with_plugin, without):
        result["resolved"].pop("random_seed")  # drawn anew in each process
    assert with_plugin == without
    assert with_plugin["hooked"] is False
    assert with_plugin["config"] is None


def test_with_the_flag(model: str) -> None:
    argv = ("--model-path", model, "--tp", "3", "--chunked-prefill-size", "6000")
    graphs = ("--cuda-graph-backend-decode", "full", "--cuda-graph-config", '{"prefill": {"backend": "breakable"}}')
    result = resolve(*argv, *graphs, "--enable-dwdp", "--dwdp-view", "direct", "--dwdp-depth", "5")
    assert (result["config"]["view"], result["config"]["depth"]) == ("direct", 5)
    assert result["config"]["direct_max_tokens"] == direct_limit(9, 2)
    resolved = result["resolved"]
    expected = {
        "dwdp_size": 3,
        "attn_dp_size": 3,
        "dp_size": 1,
        "ep_size": 1,
        "moe_dense_tp_size": 1,
        "enable_dp_lm_head": True,
        "chunked_prefill_size": 6000,  # not divided by the ranks
        "schedule_conservativeness": 1.0,
        "load_balance_method": "total_tokens",
        "attention_backend": "torch_native",
        "max_total_tokens": 32768,
        "sleep_on_idle": True,
    }
    assert {name: resolved[name] for name in expected} == expected
    assert result["graphs"] == {"decode": "disabled", "prefill": "disabled"}
    assert result["hooked"] is True
    assert result["devices"] == ["cpu"]  # which nobody named


def test_a_config_file(model: str, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        f"model-path: {model}\ndevice: cpu\ntp: 2\nenable-dwdp: true\ndwdp-depth: 3\ndwdp-audit: true\n"
        "dwdp-direct-max-tokens: 12\n"
    )
    result = resolve("--config", str(file))
    assert (result["config"]["depth"], result["config"]["audit"]) == (3, True)
    assert result["config"]["direct_max_tokens"] == 12
    assert result["resolved"]["dwdp_size"] == 2
    assert not result["resolved"]["enable_mixed_chunk"]


def test_decoding_together_goes_with_mixed_chunks(model: str) -> None:
    argv = ("--model-path", model, "--device", "cpu", "--tp", "2", "--enable-dwdp", "--dwdp-exchange", "auto")
    assert resolve(*argv)["resolved"]["enable_mixed_chunk"] is True


# In one process, as `sglang.Engine` makes them: keywords, among them SGLang's own names for what is refused.
ERRORS = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang_dwdp.srt_patches.arguments import engine_server_args
out = []
for keywords in json.loads(sys.argv[1]):
    try:
        engine_server_args(**keywords).resolve_once()
        out.append("accepted")
    except Exception as error:
        out.append(f"{type(error).__name__}: {error}")
print("RESULT " + json.dumps(out))
"""

# What SGLang itself rejects, or turns into something else, before the question of DWDP comes up.
_NOT_REACHED = {"elastic_ep_backend", "kt_weight_path", "ep_num_redundant_experts"}


def test_every_conflict_is_an_error_with_sglangs_own_arguments(model: str) -> None:
    cases = [(changes, reason) for changes, reason in CASES if not _NOT_REACHED & set(changes)]
    keywords = [
        {"model_path": model, "device": "cpu", "tp_size": 2, "enable_dwdp": True, **changes} for changes, _ in cases
    ]
    done = run(ERRORS, json.dumps(keywords))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    answers = json.loads(lines[0].removeprefix("RESULT "))
    wrong = [
        (changes, answer)
        for (changes, reason), answer in zip(cases, answers, strict=True)
        if not answer.startswith("DwdpConfigError: --enable-dwdp cannot be used here") or reason not in answer
    ]
    assert wrong == []


# What later steps, which SGLang has or will have, would make of arguments that were fine when DWDP decided.
LATER = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang_dwdp.support.conflicts import unknown_names
from sglang_dwdp.srt_patches.arguments import engine_server_args
model, changes = json.loads(sys.argv[1])
later = {}

@register_resolution_hook("handle_other_validations")
def change(server_args, previous):
    previous(server_args)
    declare_resolution(server_args, "a later step", **later)

out = []
for later in changes:
    server_args = engine_server_args(model_path=model, device="cpu", tp_size=4, enable_dwdp=True, dwdp_group_size=2)
    try:
        server_args.resolve_once()
        out.append("accepted")
    except Exception as error:
        out.append(f"{type(error).__name__}: {error}")
print("RESULT " + json.dumps([out, unknown_names(server_args), unknown_names(resolving_view(server_args))]))
"""


def test_what_later_steps_decide_otherwise_is_an_error(model: str) -> None:
    cases = [
        ({}, "accepted"),
        ({"load_format": "remote"}, "--load-format remote"),
        ({"enable_two_batch_overlap": True}, "two-batch"),
        ({"attn_dp_size": 2}, "attn_dp_size 2 in place of 4"),
        ({"dwdp_size": 4}, "dwdp_size 4 in place of 2"),
        ({"disable_cuda_graph": False}, "disable_cuda_graph False in place of True"),
        ({"chunked_prefill_size": 7}, "accepted"),
    ]
    done = run(LATER, json.dumps([model, [changes for changes, _ in cases]]))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    answers, unknown, unknown_to_view = json.loads(lines[0].removeprefix("RESULT "))
    for (changes, reason), answer in zip(cases, answers, strict=True):
        assert reason in answer, changes
    assert unknown == unknown_to_view == []  # SGLang has every argument that the table of conflicts looks at


def test_models_and_devices_that_are_unsupported(model: str, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    config = json.loads((Path(model) / "config.json").read_text())
    for name in [name for name in config if "expert" in name]:
        del config[name]
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (dense / "config.json").write_text(json.dumps(config))
    plain = {"device": "cpu", "tp_size": 2, "enable_dwdp": True}
    keywords = [
        {"model_path": str(dense), **plain},
        {"model_path": model, **plain, "tp_size": 10},
        {"model_path": model, **plain, "dwdp_depth": 0},
        {"model_path": model, "device": "cpu", "dwdp_depth": 3},
        {"model_path": model, **plain, "tp_size": 4, "dwdp_group_size": 3},
        {"model_path": model, **plain, "dwdp_local_experts": 4},
        {"model_path": model, **plain, "dwdp_local_experts": 10},
        {"model_path": model, **plain, "dwdp_transport": "cuda-ipc"},
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        running = f"127.0.0.1:{server.getsockname()[1]}"
        hosts = {"model_path": model, **plain, "nnodes": 2, "tp_size": 4, "dist_init_addr": "127.0.0.1:9"}
        keywords += [
            hosts | {"dist_init_addr": None},
            hosts | {"tp_size": 5},
            hosts | {"dwdp_transport": "host-shm"},
            hosts | {"dwdp_exchange": "auto"},
            hosts | {"dwdp_group_size": 2, "dist_init_addr": running},
            {"model_path": model, **plain, "dwdp_exchange": "auto", "speculative_algorithm": "EAGLE"},
        ]
        done = run(ERRORS, json.dumps(keywords))
    answers = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert "has no routed experts" in answers[0]
    assert "9 experts cannot be shared among 10 ranks" in answers[1]
    assert "--dwdp-depth must be a whole number of at least 1" in answers[2]
    assert "--dwdp-depth given without --enable-dwdp" in answers[3]
    assert "--tp-size 4 is not a multiple of --dwdp-group-size 3" in answers[4]
    assert "needs at least 5 on each rank to have all 9 experts" in answers[5]
    assert "--dwdp-local-experts 10" in answers[6]
    assert "--dwdp-transport cuda-ipc on --device cpu. Use host-shm or host-path" in answers[7]
    assert "--nnodes 2 needs --dist-init-addr" in answers[8]
    assert "a multiple of the hosts (got 5)" in answers[9]
    way_out = "Use a --dwdp-group-size that divides 2, the ranks of a host"
    assert f"--dwdp-transport host-shm does not cross hosts. {way_out}, or host-path." in answers[10]
    assert f"the ranks of a group have to be on one host. {way_out}, or drop --dwdp-exchange." in answers[11]
    assert f"a server is running at --dist-init-addr {running} already" in answers[12]
    assert "--dwdp-exchange auto with --speculative-algorithm EAGLE is unsupported" in answers[13]
