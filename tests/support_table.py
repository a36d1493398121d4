"""Writes docs/support.md from test results, so that it says nothing that no test has shown.

    python -m pytest … --junitxml results.xml
    python -m tests.support_table results.xml …

What passed and what failed last is remembered in docs/support.json. A test that is skipped in newer results keeps
what it had: GPU tests are skipped on machines without a GPU.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from sglang_dwdp.backends import FLASHINFER_FP8, WAYS, Status, Way
from tests.e2e.gpu_cases import ALL, FUSED, Case

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECORD, PAGE = DOCS / "support.json", DOCS / "support.md"

# The tests that have to pass for a cell, as patterns; all that match must have passed, and at least one must match.
# Where a test runs over several ranks or sizes, all of them are run together.
PARITY, MODELS = "tests/e2e/test_parity.py::", "tests/e2e/test_models.py::"
CPU_MODELS: Mapping[str, str] = {
    "Qwen3-MoE": rf"{PARITY}test_qwen3_moe_staged_and_direct\[",
    "Qwen2-MoE": rf"{PARITY}test_qwen2_moe",
    "DeepSeek-V2": rf"{PARITY}test_deepseek\w*\[deepseek_v2",
    "DeepSeek-V3, R1": rf"{PARITY}test_deepseek\w*\[deepseek_v3",
    "Kimi-K2": rf"{MODELS}test_parity\[kimi_k2-",
    "GLM-4.5": rf"{MODELS}test_parity\[glm4_moe-",
    "gpt-oss (bf16 experts, attention without sinks)": rf"{MODELS}test_parity\[gpt_oss-",
    "MiniMax-M2": rf"{MODELS}test_parity\[minimax_m2-",
}
REFUSED_MODELS: Mapping[str, tuple[str, str]] = {
    "Mixtral": (rf"{MODELS}test_mixtral_is_refused", "SGLang has no attention data parallelism for it"),
}
GPU_MODELS = "tests/e2e/test_models_on_gpu.py::"
FAMILIES: Mapping[str, str] = {
    "qwen3_moe": "Qwen3-MoE",
    "qwen2_moe": "Qwen2-MoE",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3, R1",
    "kimi_k2": "Kimi-K2",
    "glm4_moe": "GLM-4.5",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "MiniMax-M2",
    "llama4": "Llama-4 (text)",
}
WEIGHTS: Mapping[str, str] = {"bf16": "bf16", "fp8": "block-FP8", "mxfp4": "MXFP4"}
ON_GPU = "tests/test_flashinfer_on_gpu.py::test_bitwise_on_views_gpu"
KERNELS = "tests/srt_patches/test_moe_kernels_on_gpu.py::"
LAYERS: Mapping[tuple[str, str], str] = {
    ("bf16", "triton"): r"tests/srt_patches/test_moe_on_gpu\.py::test_moe_on_views_gpu\[",
    ("bf16", "flashinfer_cutlass"): rf"{ON_GPU}\[bf16-",
    ("block-FP8", FLASHINFER_FP8): rf"{ON_GPU}\[fp8-block-",
    ("block-FP8", "deep_gemm"): rf"{KERNELS}test_deep_gemm_on_views_gpu",
    ("MXFP4", "flashinfer_mxfp4"): rf"({ON_GPU}\[mxfp4-|{KERNELS}test_mxfp4_on_views_gpu)",
}
# Ways that have no test of a layer are covered by that of a model.
BY_MODELS = (("bf16", "deep_gemm"), ("block-FP8", "triton"), ("MXFP4", "triton"))

_TOP = """# What is supported

Written by `python -m tests.support_table` from test results (`docs/support.json`); not by hand. *Verified* cells
name the test; *unverified* ones fit by reading SGLang's code, and a server warns when it uses one.

## Models on the CPU engine

Every rank of a server of 2 and of 3 ranks gives the tokens of a single rank that holds all experts: small random
checkpoints with the real layer types, in float32.

| model | CPU engine |
|---|---|
"""
_GPU_MODELS = """
## Models on GPUs

Every rank gives the tokens and, bitwise, the log-probabilities of a single rank that holds all experts, with CUDA
graphs, forwards on both kinds of views, and heads and routing as in the released models. Any other pair of a model and
a way below is unverified.

| model | experts | backend | ranks | Hopper | Blackwell |
|---|---|---|---|---|---|
"""
_MIDDLE = """
## Weight formats and MoE backends on GPUs

Verified: a layer on views gives bitwise what it gives on resident experts, or (`test_parity`) a model's tokens and
log-probabilities are bitwise those of a single rank. What is not listed is refused.

| experts | backend | Hopper | Blackwell |
|---|---|---|---|
"""


def outcomes(results: Iterable[Path]) -> dict[str, str]:
    """ "passed", "failed" or "skipped" by test, from JUnit files that pytest wrote."""
    found = {}
    for path in results:
        for case in ElementTree.parse(path).iter("testcase"):
            name = case.get("classname", "").replace(".", "/") + ".py::" + case.get("name", "")
            kinds = {child.tag for child in case}
            found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found


def remember(record: Mapping[str, str], new: Mapping[str, str], day: str) -> dict[str, str]:
    """The day on which each test last passed, or "failed" and the day."""
    words = {"passed": day, "failed": f"failed {day}"}
    return dict(sorted((dict(record) | {name: words[one] for name, one in new.items() if one in words}).items()))


def evidence(record: Mapping[str, str], pattern: str) -> str | None:
    """The tests that match, in short, and the day of the oldest pass; which of them failed; None if none was run."""
    found = [name for name in record if re.match(pattern, name)]
    if not found:
        return None
    failed = [name for name in found if record[name].startswith("failed")]
    names = sorted({re.sub(r"\[.*", "", name.split("::")[-1]) for name in failed or found})
    if failed:
        return (
            f"FAILED: `{', '.join(names)}` ({len(failed)} of {len(found)}, {max(record[name][7:] for name in failed)})"
        )
    return f"verified: `{', '.join(names)}` ({len(found)} passed, {min(record[name] for name in found)})"


def on_gpu(record: Mapping[str, str], case: Case) -> str:
    """The cell of a model on Hopper: all its numbers of ranks have to be there."""
    wanted = [f"{GPU_MODELS}test_parity[{case.name}-{ranks}]" for ranks in case.ranks]
    wanted += [f"{GPU_MODELS}test_shared_experts_that_sglang_fuses[{case.name}]"] if case.name in FUSED else []
    if not set(wanted) <= set(record):
        return "unverified"
    return evidence(record, "|".join(re.escape(name) + "$" for name in wanted)) or "unverified"


def page(passed: Mapping[str, str]) -> str:
    """docs/support.md, from a record."""
    lines = _TOP.splitlines()
    lines += [f"| {model} | {evidence(passed, pattern) or 'unverified'} |" for model, pattern in CPU_MODELS.items()]
    for model, (pattern, reason) in REFUSED_MODELS.items():
        shown = evidence(passed, pattern)
        lines.append(
            f"| {model} | {shown.replace('verified', 'refused', 1) + ': ' + reason if shown else 'unverified'} |"
        )
    lines += _GPU_MODELS.splitlines()
    for case in ALL:
        ranks = " and ".join(map(str, case.ranks))
        cells = (FAMILIES[case.family], WEIGHTS[case.weights], f"`{case.backend}`", ranks, on_gpu(passed, case))
        lines.append(f"| {' | '.join(cells)} | unverified |")
    lines += _MIDDLE.splitlines()
    for way in WAYS:
        name = "`flashinfer_cutlass`" if way.backend == FLASHINFER_FP8 else f"`{way.backend}`"
        lines.append(f"| {way.weights} | {name} | {_cell(passed, way, 'Hopper')} | {_cell(passed, way, 'Blackwell')} |")
    return "\n".join(lines) + "\n"


def _cell(passed: Mapping[str, str], way: Way, gpu: str) -> str:
    if gpu not in way.gpus:
        return "–"
    if way.status is Status.REFUSED:
        return f"refused: {way.reason}"
    key = (way.weights, way.backend)
    pattern = by_models(key) if key in BY_MODELS else LAYERS.get(key)
    shown = evidence(passed, pattern) if pattern is not None and gpu == "Hopper" else None
    return shown or "unverified"


def by_models(key: tuple[str, str]) -> str:
    """The pattern of the models' tests that run this format on this backend."""
    cases = [case for case in ALL if (WEIGHTS[case.weights], case.backend) == key]
    return "|".join(re.escape(f"{GPU_MODELS}test_parity[{case.name}-") for case in cases)


def main(results: list[Path]) -> None:
    """Update the record and the page."""
    passed = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    refused = (pattern for pattern, _ in REFUSED_MODELS.values())
    patterns = (*CPU_MODELS.values(), *refused, *LAYERS.values(), GPU_MODELS)
    new = {name: one for name, one in outcomes(results).items() if any(re.match(p, name) for p in patterns)}
    passed = remember(passed, new, datetime.now(UTC).date().isoformat())
    RECORD.write_text(json.dumps(passed, indent=1) + "\n")
    PAGE.write_text(page(passed))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
