"""Every rank of a DWDP server gives the tokens and, bitwise, the log-probabilities of a rank that holds all experts.

    python -m pytest -m "gpu and models" tests/gpu/test_models.py --junitxml r.xml

One GPU is enough: the ranks of an engine share it (`benchmarks/one_gpu.py`). All engines are started when the first
test wants one, several at a time, on all GPUs there are; a test waits for those that it compares. Variables:
DWDP_ENGINES_AT_A_TIME (by processors), DWDP_ENGINES_DEADLINE_S (after which tests whose engines have not answered
are skipped), DWDP_ENGINES_LOGS (a folder that keeps every engine's log and answers), DWDP_ENGINES_RESUME=1 (answers
that an interrupted run left there are taken; these can be compared without a GPU), DWDP_ENGINES_FIRST_PORT (for two
runs at a time).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import FIRST_PORT, REPORT, EngineProcess, Request
from benchmarks.one_gpu import one_gpu_environment
from benchmarks.processes import RunError
from benchmarks.variants import QUIET
from tests.fixtures.families import make_checkpoint, make_head
from tests.fixtures.model_modules import FEWER_MODELS
from tests.gpu.cases import ALL, BY_NAME, FUSED, LENGTHS, NEW_TOKENS, OPTIONS, VARIATIONS, Case, prompts

RESUME = os.environ.get("DWDP_ENGINES_RESUME") == "1"
pytestmark = [pytest.mark.models] if RESUME else [pytest.mark.gpu(3), pytest.mark.models]

ENGINE_S = 900.0  # SGLang compiles Marlin when it is first needed: on one core that took 8 minutes for each type
DIRECT_MAX_TOKENS = 64
Answers = list[list[Any]]  # of each rank, in the order of the prompts
# A single rank without DWDP gets what DWDP brings: slim modules, and block-FP8 through FlashInfer.
# Small scales and biases are shared like weights, as those of large models are.
SHARE_ALL_PLUGIN = """
def register():
    from sglang_dwdp.experts import layer

    layer.REPLICATE_BELOW_BYTES = 0
"""
RESIDENT_PLUGIN = """
def install(_result, _server_args, *_args, role, **_kwargs):
    if role == "scheduler":
        from sglang_dwdp.support import flashinfer_modules
        from sglang_dwdp.srt_patches import flashinfer_fp8
        from sglang_dwdp.srt_patches.hooks import install as install_hooks

        flashinfer_modules.install()
        flashinfer_fp8.register()
        install_hooks(flashinfer_fp8.HOOKS)
        print("this rank has the kernels that DWDP brings", flush=True)

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.runtime_context.publish", install, HookType.AFTER)
"""
# Where SGLang has Marlin add the parts of a sum with atomics, their order and so the bits differ from call to call; and
# so they do with the tile that a row is in (`tests/fixtures/row_order.py`): ranks of one engine differ as well.
FIXED_ORDER_PLUGIN = """
def install(_result, _server_args, *_args, role, **_kwargs):
    if role == "scheduler":
        import functools

        from sglang.srt.layers.moe import fused_moe_triton
        from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe

        from tests.fixtures.row_order import in_order

        multiply, align = fused_marlin_moe.moe_wna16_marlin_gemm, fused_moe_triton.moe_align_block_size

        @functools.wraps(multiply)
        def fixed(*args, **kwargs):
            return multiply(*args, **{**kwargs, "use_atomic_add": False})

        @functools.wraps(align)
        def aligned(ids, block_size, *args, **kwargs):
            rows, experts, num_padded = align(ids, block_size, *args, **kwargs)
            return in_order(rows, experts, num_padded, block_size, ids.numel()), experts, num_padded

        fused_marlin_moe.moe_wna16_marlin_gemm, fused_moe_triton.moe_align_block_size = fixed, aligned
        print("Marlin adds up in a fixed order", flush=True)

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.runtime_context.publish", install, HookType.AFTER)
"""
# Triton times the configurations that a kernel may have and keeps the fastest; they add up in different orders.
FIRST_CONFIGURATION_PLUGIN = """
def register():
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.prune_configs
    Autotuner.prune_configs = lambda *args, **kwargs: list(original(*args, **kwargs))[:1]
    print("Triton takes a kernel's first configuration", flush=True)
"""


class Engines:
    """Runs engines in processes of their own, some at a time, each on the GPU that has the fewest ranks."""

    def __init__(self, directory: Path, models: Callable[[Case], Path]) -> None:
        logs = os.environ.get("DWDP_ENGINES_LOGS")
        self.logs = Path(logs) if logs else directory
        self.logs.mkdir(parents=True, exist_ok=True)
        self._directory, self._models = directory, models
        at_a_time = int(os.environ.get("DWDP_ENGINES_AT_A_TIME") or max(1, len(os.sched_getaffinity(0)) // 2))
        self._pool = ThreadPoolExecutor(at_a_time)
        self._deadline = time.monotonic() + float(os.environ.get("DWDP_ENGINES_DEADLINE_S") or 3600)
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
        self._ranks_on = Counter(dict.fromkeys(gpus, 0))
        self._lock = threading.Lock()
        self._count = itertools.count()
        self._futures: dict[str, Future[dict[str, Any]]] = {}

    def start(self, case: Case, ranks: int, *, fused: bool = False) -> None:
        """Start an engine unless it was; 1 rank holds all experts."""
        name = self.name(case, ranks, fused)
        if name not in self._futures:
            self._futures[name] = self._pool.submit(self._run, name, case, ranks, fused)

    def result(self, case: Case, ranks: int, *, fused: bool = False) -> dict[str, Any]:
        """By rank its answers (`benchmarks.engine.Answer`) and reports, and the engine's log."""
        self.start(case, ranks, fused=fused)
        result = self._futures[self.name(case, ranks, fused)].result()
        if "skipped" in result:
            pytest.skip(result["skipped"])
        if "error" in result:
            pytest.fail(result["error"], pytrace=False)
        return result

    @staticmethod
    def name(case: Case, ranks: int, fused: bool = False) -> str:
        if ranks == 1:
            case = replace(case, variation="")
        return f"{case.name}-{'fused' if fused else ranks}"

    def close(self) -> None:
        self._deadline = 0.0
        self._pool.shutdown(cancel_futures=True)

    def _run(self, name: str, case: Case, ranks: int, fused: bool) -> dict[str, Any]:
        out, log = self.logs / f"{name}.json", self.logs / f"{name}.log"
        if RESUME and out.exists():
            return {**json.loads(out.read_text()), "log": log.read_text(errors="replace")}
        if not self._ranks_on:
            return {"skipped": f"{name} has not run, and there is no GPU"}
        if time.monotonic() > self._deadline:
            return {"skipped": f"{name} was not started before DWDP_ENGINES_DEADLINE_S"}
        with self._lock:
            gpu = min(self._ranks_on, key=lambda index: self._ranks_on[index])
            self._ranks_on[gpu] += ranks
        try:
            return self._run_on(gpu, name, case, ranks, fused)
        except Exception as error:  # noqa: BLE001  (it is this engine's result)
            return {"error": f"{name}: {type(error).__name__}: {error}"}
        finally:
            with self._lock:
                self._ranks_on[gpu] -= ranks

    def _run_on(self, gpu: str, name: str, case: Case, ranks: int, fused: bool) -> dict[str, Any]:
        own = self._directory / name
        own.mkdir(parents=True)
        kept = self.logs / f"{name}.json"
        kept.unlink(missing_ok=True)
        options = OPTIONS | self.options(case, ranks, fused) | {"model_path": str(self._models(case))}
        environment = {**os.environ, **FEWER_MODELS, **QUIET, **case.environment, "CUDA_VISIBLE_DEVICES": gpu}
        environment |= {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if case.runs[1] == "marlin":
            environment |= plugin_environment(own, "fixed_order", FIXED_ORDER_PLUGIN, environment)
        if case.tuned:
            environment |= plugin_environment(own, "first_configuration", FIRST_CONFIGURATION_PLUGIN, environment)
        if ranks > 1:
            environment |= one_gpu_environment(own, environment)
            if case.share_all and ranks == 3:
                environment |= plugin_environment(own, "share_all", SHARE_ALL_PLUGIN, environment)
        elif case.kernels is not None:
            environment |= plugin_environment(own, "resident_kernels", RESIDENT_PLUGIN, environment)
        began = time.monotonic()
        until = min(began + ENGINE_S, self._deadline)
        with closing(EngineProcess(name, options, environment, self.logs, routed=ranks > 1)) as engine:
            try:
                engine.wait_ready(until - time.monotonic())
                request = Request("answers", dict.fromkeys(range(ranks), prompts()), NEW_TOKENS)
                answers = engine.ask(request, until - time.monotonic())
                states = engine.ask(REPORT, until - time.monotonic())
            except RunError as error:
                if time.monotonic() > self._deadline:
                    return {"skipped": f"{name} had no answers before DWDP_ENGINES_DEADLINE_S; {engine.log}"}
                last = "\n".join(engine.log.read_text(errors="replace").splitlines()[-40:])
                return {"error": f"{error}; {engine.log}:\n{last}"}
        result = {
            "answers": [answers[rank] for rank in range(ranks)],
            "reports": [state.get("dwdp") for state in states],
        }
        kept.with_suffix(".part").write_text(json.dumps(result))
        kept.with_suffix(".part").rename(kept)
        print(f"{name}: {time.monotonic() - began:.0f} s on GPU {gpu}")  # noqa: T201
        # Through JSON, as answers of an interrupted run come.
        return {**json.loads(kept.read_text()), "log": engine.log.read_text(errors="replace")}

    def options(self, case: Case, ranks: int, fused: bool) -> dict[str, Any]:
        """The engine's options. Engines that start together would draw the same ports."""
        result: dict[str, Any] = {
            "tp_size": ranks,
            "port": FIRST_PORT + 400 * (next(self._count) % 50),
            "moe_runner_backend": case.backend,
            "cuda_graph_backend_prefill": "disabled",
            "disable_shared_experts_fusion": not fused,
            **case.options,
        }
        if case.head:
            result["speculative_draft_model_path"] = str(self._models(case) / case.head)
        if ranks > 1:
            result |= {"enable_dwdp": True, "dwdp_direct_max_tokens": DIRECT_MAX_TOKENS, **case.dwdp}
        return result


def plugin_environment(directory: Path, name: str, source: str, base: dict[str, str]) -> dict[str, str]:
    """Installs a plugin of SGLang's for one engine; the environment in which it is found."""
    (directory / f"{name}.py").write_text(source)
    info = directory / f"{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(directory), base.get("PYTHONPATH"))))}


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """All engines that the chosen tests want; those that others are compared with come first, and so compile."""
    directory = tmp_path_factory.mktemp("engines")
    lock = threading.Lock()  # transformers imports its modules when they are first asked for, for one thread only

    def model(case: Case) -> Path:
        sizes = zlib.crc32(repr(sorted(case.shape.items())).encode())
        path = directory / f"{case.family}-{case.weights}-{sizes:08x}"
        with lock:
            if not path.exists():
                make_checkpoint(path, case.family, quantization=case.quantization, **case.shape)
            if case.head and not (path / case.head).exists():
                make_head(path / case.head, case.head, path)
        return path

    runner = Engines(directory, model)
    chosen = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    wanted = [item.callspec.params["name"] for item in chosen]
    for name in dict.fromkeys(wanted):
        if missing_kernels(BY_NAME[name]) is None:
            runner.start(BY_NAME[name], 1)
    for item in chosen:
        case = BY_NAME[item.callspec.params["name"]]
        if missing_kernels(case) is None:
            fused = "ranks" not in item.callspec.params
            for kernel in FUSED[case.name] if fused else ():
                runner.start(BY_NAME[kernel], 1)
            runner.start(case, 1 if fused else item.callspec.params["ranks"], fused=fused)
    yield runner
    runner.close()


def missing_kernels(case: Case) -> str | None:
    """What has to be built first; None: nothing."""
    from sglang_dwdp.support import flashinfer_modules

    if (
        case.kernels is None or case.kernels in flashinfer_modules.built() or not torch.cuda.is_available()
    ):  # nothing starts then
        return None
    return f"needs `python kernels/build.py --format {case.kernels}`"


def skip_without_kernels(case: Case) -> None:
    if case.kernels is not None and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    if reason := missing_kernels(case):
        pytest.skip(reason)


@pytest.mark.parametrize(("name", "ranks"), [(case.name, ranks) for case in ALL for ranks in case.ranks])
def test_parity(engines: Engines, name: str, ranks: int) -> None:
    case = BY_NAME[name]
    skip_without_kernels(case)
    resident = engines.result(case, 1)
    assert case.kernels is None or "this rank has the kernels that DWDP brings" in resident["log"]
    expected = resident["answers"][0]
    result = engines.result(case, ranks)
    different = {tuple(answer[0]) for answer in expected}
    assert len(different) > len(LENGTHS) // 2, "degenerate answers compare nothing"
    for rank, answers in enumerate(result["answers"]):
        for length, got, wanted in zip(LENGTHS, answers, expected, strict=True):
            assert got[0] == wanted[0], f"tokens of rank {rank} after {length} tokens"
            assert got[1] == wanted[1], f"log-probabilities of rank {rank} after {length} tokens"
    assert len(result["answers"]) == ranks
    for report in result["reports"]:
        assert report["direct_forwards"] > 0
        assert report["staged_forwards"] > 0
    assert f"run {case.logged}" in result["log"]
    if case.runs[1] == "marlin":
        assert "Marlin adds up in a fixed order" in resident["log"]
        assert "Marlin adds up in a fixed order" in result["log"]
    if case.tuned:
        assert "Triton takes a kernel's first configuration" in resident["log"]
        assert "Triton takes a kernel's first configuration" in result["log"]
    assert_decodes_by_graphs(result["log"], ranks)


def assert_decodes_by_graphs(log: str, ranks: int) -> None:
    """By SGLang's own lines, some for each rank."""
    decodes = [line for line in log.splitlines() if "Decode batch" in line]
    assert {line.split("DP")[1][0] for line in decodes} == {str(rank) for rank in range(ranks)}
    assert all("cuda graph: True" in line for line in decodes)


@pytest.mark.parametrize(("name", "ranks"), [(case.name, ranks) for case in VARIATIONS for ranks in case.ranks])
def test_options_of_dwdp(engines: Engines, name: str, ranks: int) -> None:
    """Neither counting nor a wish for graphs that cannot be changes an answer, or stops the capture of graphs; nor does
    it matter who chose the backend."""
    skip_without_kernels(BY_NAME[name])
    expected = engines.result(BY_NAME[name], 1)["answers"][0]
    result = engines.result(BY_NAME[name], ranks)
    assert result["answers"] == [expected] * ranks
    if name.endswith("staged"):
        assert "cuda graph: True" not in result["log"]
    else:
        assert_decodes_by_graphs(result["log"], ranks)
    if name.endswith("auto"):
        assert f"run {BY_NAME[name].logged}" in result["log"]
        return
    for report in result["reports"]:
        if name.endswith("audit"):
            assert report["direct_forwards"] > 0
            assert report["bytes_read_in_place"] > 0
        else:
            assert report["direct_forwards"] == 0
            assert report["staged_forwards"] > len(LENGTHS)


class Distance:
    """How far the answers of two ranks lie apart, over the tokens before the first that differs.

    tokens: how many those are, of all answers.  rms, largest: of the log-probabilities' differences.  gap: the largest
    difference, where tokens part, of the second rank's two best log-probabilities.
    """

    def __init__(self, got: Answers, wanted: Answers) -> None:
        differences, gaps = [], [0.0]
        for (tokens, chosen, *_), (others, wanted_chosen, best, *_) in zip(got, wanted, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))
            differences += [abs(a - b) for a, b in zip(chosen[:same], wanted_chosen[:same], strict=True)]
            if same < len(tokens):
                gaps.append(best[same][0] - best[same][1])
        self.tokens, self.largest, self.gap = len(differences), max(differences, default=0.0), max(gaps)
        self.rms = math.sqrt(sum(one * one for one in differences) / max(1, self.tokens))

    def __repr__(self) -> str:
        return f"{self.tokens} tokens, rms {self.rms:.3f}, at most {self.largest:.3f}, gap {self.gap:.3f}"


@pytest.mark.parametrize("name", FUSED)
def test_shared_experts_that_sglang_fuses(engines: Engines, name: str) -> None:
    """DWDP turns the fusion off. Sums are rounded otherwise then, which changes no more than other MoE kernels do."""
    fused = engines.result(BY_NAME[name], 1, fused=True)["answers"][0]
    plain = engines.result(BY_NAME[name], 1)["answers"][0]
    one, other = (engines.result(BY_NAME[kernel], 1)["answers"][0] for kernel in FUSED[name])
    measured, usual = Distance(plain, fused), Distance(one, other)
    print(f"{name}, fused or not: {measured}; {' and '.join(FUSED[name])}: {usual}")  # noqa: T201
    assert fused != plain, "nothing was fused"
    assert measured.rms < 1.5 * usual.rms
    assert measured.tokens > usual.tokens / 1.5
    assert measured.gap < 2 * max(measured.largest, usual.largest)  # each of the two moved by one difference
