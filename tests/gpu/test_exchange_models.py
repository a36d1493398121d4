"""Exchange steps of models between all GPUs: answers of ranks that run together beside those that run alone.

Sums are rounded in another order, as in expert parallelism, whose answers say how much that changes.

python -m pytest -m "gpus and models" tests/gpu/test_exchange_models.py
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import REPORT, EngineProcess, Request
from benchmarks.variants import QUIET
from tests.fixtures.families import make_checkpoint
from tests.fixtures.model_modules import FEWER_MODELS
from tests.gpu.cases import BY_NAME, NEW_TOKENS, OPTIONS, prompts
from tests.gpu.test_models import Distance

pytestmark = [pytest.mark.gpus(2), pytest.mark.models]
SIZE, READY_S = max(2, torch.cuda.device_count()), 300.0
# Large enough that decoding together is the faster way, or else ranks would never choose it.
PREFILL = 512  # tokens of the prefill graph, of which there is a joint one
LARGE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "top_k": 8}


@pytest.mark.parametrize(
    ("name", "joint"),
    [
        ("qwen3_moe-bf16-triton", True),
        ("deepseek_v3-fp8-triton", True),
        ("gpt_oss-mxfp4-triton", True),
        ("qwen3_moe-bf16-flashinfer_cutlass", False),
    ],
)
def test_answers_are_those_of_running_alone(tmp_path: Path, name: str, joint: bool) -> None:
    """They are no further from those of running alone than expert parallelism's are. Other runners run alone."""
    case = BY_NAME[name]
    if case.kernels is not None:
        from sglang_dwdp.support import flashinfer_modules

        if case.kernels not in flashinfer_modules.built():
            pytest.skip(f"needs `python kernels/build.py --format {case.kernels}`")
    model = tmp_path / "model"
    make_checkpoint(model, case.family, quantization=case.quantization, **{**case.shape, **LARGE})
    environment = {**os.environ, **FEWER_MODELS, **QUIET, **case.environment, "HF_HUB_OFFLINE": "1"}
    environment |= {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    shared: dict[str, Any] = {
        **OPTIONS,
        **case.options,
        "model_path": str(model),
        "tp_size": SIZE,
        "moe_runner_backend": case.backend,
        "cuda_graph_bs_prefill": [PREFILL],
    }
    found: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {mode: {"enable_dwdp": True, "dwdp_exchange": mode} for mode in ("off", "auto")}
    if joint:
        kinds["ep"] = {"dp_size": SIZE, "enable_dp_attention": True, "ep_size": SIZE}
    engines = {
        name: EngineProcess(name, {**shared, **options}, environment, tmp_path, index=index)
        for index, (name, options) in enumerate(kinds.items())
    }
    for mode, engine in engines.items():
        with closing(engine):
            engine.wait_ready(READY_S)
            found[mode] = engine.ask(Request("answers", dict.fromkeys(range(SIZE), prompts()), NEW_TOKENS))
            if mode == "auto":
                before = [state["dwdp"] for state in engine.ask(REPORT)]
                engine.ask(Request("answers", {0: [[11] * (PREFILL - 12)]}, 1))  # the other ranks are idle
                reports = [state["dwdp"] for state in engine.ask(REPORT)]
    if not joint:
        assert "ranks decode alone" in engines["auto"].log.read_text(errors="replace")
        assert found["auto"] == found["off"]
        return
    assert all(report["joint_rounds"] > 0 and not report["joint_rounds_ended"] for report in reports)
    assert reports[0]["exchanged_rows"] == before[0]["exchanged_rows"] + PREFILL - 12
    helped = [after["helped_rounds"] - then["helped_rounds"] for after, then in zip(reports, before, strict=True)]
    assert helped == [0] + [1] * (SIZE - 1)
    for rank in range(SIZE):
        distance, usual = (Distance(found[name][rank], found["off"][rank]) for name in ("auto", "ep"))
        assert distance.tokens > usual.tokens / 1.5, (distance, usual)
        assert distance.rms < 1.5 * usual.rms, (distance, usual)
        assert distance.gap < 2 * max(distance.largest, usual.largest), (distance, usual)
