"""New weights on a GPU: answers are those of an engine that started with them, with the CUDA graphs of before.

    python -m pytest -m "gpu and models" tests/gpu/test_updates.py

One GPU is enough: the ranks of an engine share it.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import REPORT, Call, EngineProcess, Request
from benchmarks.one_gpu import one_gpu_environment
from benchmarks.variants import QUIET
from tests.fixtures.families import make_checkpoint
from tests.fixtures.model_modules import FEWER_MODELS
from tests.gpu.cases import BY_NAME, NEW_TOKENS, OPTIONS, prompts

pytestmark = [pytest.mark.gpu(3), pytest.mark.models]
RANKS, READY_S = 2, 300.0


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe-bf16-triton",
        "qwen3_moe-fp8-triton",
        "qwen3_moe-fp8-flashinfer_cutlass",
        "deepseek_v3-bf16-triton",
        "deepseek_v3-fp8-triton",
    ],
)
def test_an_updated_engine_is_one_that_started_with_these_weights(tmp_path: Path, name: str) -> None:
    case = BY_NAME[name]
    if case.kernels is not None:
        from sglang_dwdp.support import flashinfer_modules

        if case.kernels not in flashinfer_modules.built():
            pytest.skip(f"needs `python kernels/build.py --format {case.kernels}`")
    old, new = tmp_path / "old", tmp_path / "new"
    for seed, model in enumerate((old, new)):
        make_checkpoint(model, case.family, seed=seed, quantization=case.quantization, **case.shape)
    environment = {**os.environ, **FEWER_MODELS, **QUIET, **case.environment, "HF_HUB_OFFLINE": "1"}
    environment |= {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= one_gpu_environment(tmp_path, environment)
    # Prefill graphs too, and forwards of all kinds: in place, and staged.
    options: dict[str, Any] = {
        **OPTIONS,
        **case.options,
        "tp_size": RANKS,
        "enable_dwdp": True,
        "dwdp_direct_max_tokens": 64,
        "moe_runner_backend": case.backend,
        "mem_fraction_static": 0.3,
    }
    request = Request("answers", dict.fromkeys(range(RANKS), prompts()), NEW_TOKENS)

    def engine(label: str, model: Path, index: int) -> EngineProcess:
        return EngineProcess(label, {**options, "model_path": str(model)}, environment, tmp_path, index=index)

    def update(served: EngineProcess, model: Path) -> None:
        answer = served.ask(Call("update_weights_from_disk", {"model_path": str(model)}))
        assert answer[0], answer

    with closing(engine("fresh", new, 0)) as fresh:
        fresh.wait_ready(READY_S)
        expected = fresh.ask(request)
    with closing(engine("updated", old, 1)) as served:
        served.wait_ready(READY_S)
        first = served.ask(request)
        assert first != expected
        update(served, new)
        assert served.ask(request) == expected
        for _ in range(2):
            served.ask(Call("release_memory_occupation", {"tags": ["weights"]}))
            served.ask(Call("resume_memory_occupation", {"tags": ["weights"]}))
            update(served, old)
            assert served.ask(request) == first
            update(served, new)
            assert served.ask(request) == expected
        for report in (state["dwdp"] for state in served.ask(REPORT)):
            assert report["weight_updates"] == 5
            assert report["late_fills"] == 0
            assert min(report["direct_forwards"], report["staged_forwards"]) > 0
