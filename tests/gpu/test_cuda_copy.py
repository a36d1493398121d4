"""The copy engine of a GPU: what it copies, what is timed, and how fast; one GPU is enough."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.memory.cuda_copy import CudaCopyEngine
from sglang_dwdp.runtime import DwdpRuntime
from tests.fixtures.ranks import CUDA, PlainLayer, checkpoint, run_ranks

pytestmark = pytest.mark.gpu(4)


def test_single_copies_and_a_batch_copy_the_same() -> None:
    engine: Any = CUDA.memory().copy_engine(30.0)
    sources = torch.randint(0, 255, (300, 70_001), dtype=torch.uint8, device="cuda")
    for batch in (True, False):
        slots = torch.zeros_like(sources)
        if not batch:
            engine._submit = None
        elif engine._submit is None:
            continue
        released, filled = engine.event(), engine.event()
        engine.record(released)
        engine.fill(engine.prepare(list(zip(slots, sources, strict=True))), released, filled)
        engine.wait(filled)
        assert torch.equal(slots, sources)
    engine.close()


def test_what_the_compute_stream_waits_is_exposed() -> None:
    engine: Any = CudaCopyEngine(0, time_every=1)
    released, filled = engine.event(), engine.event()

    def wait_for_a_fill(delay: int) -> float:
        before = engine.exposed_s()
        torch.cuda.synchronize()
        with torch.cuda.stream(engine._streams[0]):
            torch.cuda._sleep(delay)
        engine.fill(engine.prepare([]), released, filled)
        engine.wait(filled)
        torch.cuda.synchronize()
        exposed: float = engine.exposed_s() - before
        return exposed

    wait_for_a_fill(1)
    assert wait_for_a_fill(1) < 0.005
    assert 0.01 < wait_for_a_fill(100_000_000) < 1  # about 60 ms
    for _ in range(2 * engine._stopwatch.PAIRS):
        engine.wait(filled)
    torch.cuda.synchronize()
    assert engine.exposed_s() < 1.5
    engine.close()


def test_a_sample_of_waits_stands_for_all() -> None:
    engine: Any = CudaCopyEngine(0, time_every=3)
    released, filled = engine.event(), engine.event()
    for _ in range(9):
        with torch.cuda.stream(engine._streams[0]):
            torch.cuda._sleep(20_000_000)  # about 12 ms
        engine.fill(engine.prepare([]), released, filled)
        engine.wait(filled)
        torch.cuda.synchronize()
    assert 0.03 < engine.exposed_s() < 0.4
    waits = engine.take_waits()
    assert len(waits) == 3
    assert engine.exposed_s() == pytest.approx(3 * sum(waits))
    assert engine.take_waits() == []
    engine.close()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_copy_plan_is_as_fast_as_one_large_copy_cuda(size: int) -> None:
    """Qwen3-30B-A3B's expert shapes: one fill of a slot against one copy of as many bytes."""
    full = checkpoint(1, 128, {"w13_weight": (1536, 2048), "w2_weight": (2048, 768)}, "cuda")

    def step(runtime: DwdpRuntime, layers: list[PlainLayer]) -> tuple[float, float] | None:
        if runtime.rank:
            time.sleep(3)
            return None
        engine: Any = runtime._engine
        prefetcher: Any = runtime.staged.prefetcher
        (plan,), (nbytes,) = prefetcher._plans, prefetcher._plan_bytes
        source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        whole = engine.prepare([(torch.empty_like(source), source)])

        def seconds(prepared: Any) -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            times = []
            for _ in range(8):
                torch.cuda.synchronize()
                start.record(engine._streams[0])
                engine.fill(prepared, torch.cuda.Event(), torch.cuda.Event())
                end.record(engine._streams[0])
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            return statistics.median(times[2:])

        return nbytes / seconds(plan), nbytes / seconds(whole)

    result = run_ranks(size, full, step, DwdpConfig(view="staged"))[0]
    assert isinstance(result, tuple), result
    planned, whole = result
    print(f"{size} ranks: copy plan {planned / 1e9:.0f} GB/s, one copy {whole / 1e9:.0f} GB/s")  # noqa: T201
    assert planned >= 0.95 * whole
