"""What others have published, and what the planner and the simulator say of it.

Constants come from Table 1 of the DWDP paper (arXiv 2604.01621) alone, through `paper_calibration.py`; every other
figure is predicted. Published figures: the paper, TensorRT-LLM's blog 19, and SGLang's ROCm results
(sgl-project/sglang#33310).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import comb
from typing import Any

import numpy as np

from benchmarks.paper_calibration import (
    GB200,
    MODEL,
    PRECISION,
    ROUNDS,
    TABLE_1_COPY,
    TABLE_1_DEP,
    TABLE_1_DWDP_TOTAL,
    TABLE_1_MERGE,
    TOKEN_BUDGETS,
    merge_seconds,
    roofline_gpu,
    table_1_length_wait,
)
from sglang_dwdp.planner.cost import Group, dwdp, serial_slowdown
from sglang_dwdp.planner.dep import dep, expert_wait
from sglang_dwdp.planner.formats import FORMATS, Precision
from sglang_dwdp.planner.gpus import get_gpu
from sglang_dwdp.planner.scenario import Scenario
from sglang_dwdp.planner.simulate import Result, simulate
from sglang_dwdp.planner.workload import Lengths, batch_of, mean_batch


@dataclass(frozen=True)
class Row:
    """One published figure, what is planned, and how far apart they may be.

    unit: `pt` compares 100 x (planned - published), `%` the relative error. limit: None where the figure served to
    calibrate or is shown for information.
    """

    table: str
    case: str
    published: float
    planned: float
    unit: str = "%"
    limit: float | None = None

    @property
    def error(self) -> float:
        """In percent or in points of the ratio."""
        return 100 * (self.planned - self.published) / (1 if self.unit == "pt" else self.published)

    @property
    def holds(self) -> bool | None:
        """Whether the error is within the limit; None without one."""
        return None if self.limit is None else abs(self.error) <= self.limit + 1e-9


def table_1() -> list[Row]:
    """The calibration itself: DEP must come back, the naive DWDP is half predicted.

    DEP's wait is the one of an iteration whose prompts' lengths vary by 20 %, as calibrated; the forward of ranks that
    pack prompts of ratio 0.8 (variation 6 %) is shown beside it.
    """
    told, packed = TABLE_1_DEP, dep(MODEL, GB200, PRECISION, ROUNDS)
    parts = packed.parts
    wait = table_1_length_wait(parts) + expert_wait(MODEL, GB200, 4, parts.grouped_gemm)
    alone = dwdp(MODEL, GB200, PRECISION, mean_batch(ROUNDS), Group(4))
    merge = merge_seconds(GB200)
    naive = alone.compute + merge  # its copies are hidden
    figures = (
        ("DEP4 attention", told.attention, parts.attention),
        ("DEP4 grouped GEMM", told.grouped_gemm, parts.grouped_gemm),
        ("DEP4 dense GEMM", told.dense_gemm, parts.dense_gemm),
        ("DEP4 others", told.other, parts.other),
        ("DEP4 communication", told.communication, parts.communication),
        ("DEP4 synchronisation at 20 % length CV", told.synchronisation, wait),
        ("DEP4 forward at 20 % length CV", told.total, packed.compute + parts.communication + wait),
        ("DEP4 forward, packed (6 % CV)", told.total, packed.seconds),
        ("DWDP4 P2P copy, contended", TABLE_1_COPY, alone.fetch * serial_slowdown(4, alone.fetch, naive)),
        ("DWDP4 merge copy (predicted)", TABLE_1_MERGE, merge),
        ("naive DWDP4 forward", TABLE_1_DWDP_TOTAL, naive),
    )
    return [Row("P Table 1, ms", case, 1e3 * published, 1e3 * planned) for case, published, planned in figures]


CONTENTION = {
    3: (50.00, 50.00),
    4: (44.44, 44.44, 11.11),
    6: (40.96, 40.96, 15.36, 2.56, 0.16),
    8: (39.66, 39.66, 16.52, 3.67, 0.46, 0.03),
    12: (38.55, 38.55, 17.35, 4.63, 0.81, 0.097),
    16: (38.06, 38.06, 17.67, 5.05, 0.99, 0.14),
}


def contention_probabilities(group_size: int) -> list[float]:
    """Pr[C = 1], Pr[C = 2], ... for one pull; C counts the pulls on its source, itself included.

    Each of the other N - 2 possible readers of the source picks it with probability 1/(N-1), so C = 1 + Binomial(N-2,
    1/(N-1)) (arXiv 2604.01621, equation 2).
    """
    others, chance = group_size - 2, 1 / (group_size - 1)
    return [comb(others, x) * chance**x * (1 - chance) ** (others - x) for x in range(others + 1)]


def counted_contention(size: int, rounds: int) -> list[float]:
    """Pr[C = 1], Pr[C = 2], ... counted: every rank draws a peer at random, `rounds` times."""
    rng, ranks = np.random.default_rng(0), np.arange(size)
    draw = rng.integers(0, size - 1, (rounds, size), dtype=np.int32)
    source = draw + (draw >= ranks) + size * np.arange(rounds)[:, None]  # a rank never pulls from itself
    readers = np.bincount(source.ravel(), minlength=rounds * size)
    counts = np.bincount(readers[source].ravel(), minlength=size + 1)
    return [float(counts[c] / counts.sum()) for c in range(1, size)]


def table_2() -> list[Row]:
    """Shares of pulls, from the formula and counted; a point is a percentage point."""
    rows = []
    for size, published in CONTENTION.items():
        found = {"analytic": contention_probabilities(size), "simulated": counted_contention(size, 12_000_000 // size)}
        for level, value in enumerate(published):
            case = f"DWDP{size} Pr[C={level + 1}]"
            rows += [Row(f"P Table 2, {how}", case, value / 100, found[how][level], "pt", 0.1) for how in found]
    return rows


def roofline() -> list[Row]:
    """Blog 19 Table 1 by the definition of the paper's section 3.

    Peaks for every efficiency; attention and MoE operators of the 58 MoE layers only; one copy of a token per routed
    expert, NVFP4 out and bf16 back; T_DWDP = max(compute, fetch), T_DEP = compute + exchange. The checkpoint's
    attention runs in bf16 here.
    """
    model = replace(MODEL, layers=MODEL.moe_layers, dense_layers=0)
    gpu = roofline_gpu(GB200)
    precision = Precision(FORMATS["nvfp4"], FORMATS["bf16"], dispatch_bytes=0.5625)
    published = {1024: (0.19, 0.10), 8192: (0.62, 0.73), 16384: (1.52, 1.27), 32768: (4.77, 1.17)}
    rows = []
    for length, (ratio, speedup) in published.items():
        batch = batch_of([(length, 0)])
        local = dwdp(model, gpu, precision, batch, Group(4))
        remote = dep(model, gpu, precision, [[batch] * 4], "all-copies")
        compute = local.compute - local.parts.other  # the roofline counts no small kernels
        exchanged = remote.seconds - remote.parts.other
        slower = max(compute, local.fetch)
        rows.append(Row("B Table 1, compute / fetch", f"ISL {length}", ratio, compute / local.fetch))
        rows.append(Row("B Table 1, speed-up", f"ISL {length}", speedup, exchanged / slower, "%", 10))
    return rows


def _serve(lengths: Lengths, budget: int, mode: str, **settings: Any) -> Result:
    """A context server as in TensorRT-LLM's examples/dwdp: 4,096 requests, 256 of them in flight, no chunking."""
    settings |= {"token_budget": TOKEN_BUDGETS[budget], "chunked": False, "requests": 4096, "concurrency": 256}
    return simulate(Scenario(MODEL, GB200, PRECISION, lengths, mode, **settings))


# by ratio of lengths and token budget: published TPS/GPU over DEP, with merge elimination, and with slices as well
TABLE_4 = {
    (0.5, 16384): (0.995, 1.081),
    (0.5, 32768): (1.140, 1.139),
    (0.8, 16384): (1.039, 1.053),
    (0.8, 32768): (1.098, 1.109),
}


@cache
def ablation() -> list[Row]:
    """Table 4."""
    rows = []
    for (ratio, budget), published in TABLE_4.items():
        lengths = Lengths("uniform", 8192, ratio=ratio)
        base = _serve(lengths, budget, "dep").tokens_per_second_per_gpu
        for copies, value, name in zip(("serial", "sliced"), published, ("merge elim.", "+ slices"), strict=True):
            rate = _serve(lengths, budget, "dwdp", copies=copies).tokens_per_second_per_gpu
            case = f"ratio {ratio}, MNT {budget // 1024}K, {name}"
            rows.append(Row("P Table 4, TPS/GPU", case, value, rate / base, "pt", 5))
    return rows


EVEN = {length: Lengths("uniform", length, ratio=0.8) for length in (1024, 8192, 16384, 32768)}
NORMAL = {std: Lengths("normal", 16384, std=std, limit=16384) for std in (0, 1024, 2048, 4096)}
# case, lengths, token budget, DWDP's GPUs, experts stored on each, published TTFT and TPS/GPU over DEP4
TABLE_3 = (
    ("ISL 1024", EVEN[1024], 32768, 4, 0, 1.27, 1.11),
    ("ISL 8192", EVEN[8192], 32768, 4, 0, 1.16, 1.10),
    ("ISL 16384", EVEN[16384], 32768, 4, 0, 1.12, 1.09),
    ("ISL 32768", EVEN[32768], 32768, 4, 0, 1.11, 1.09),
    ("ISL 8192, MNT 16K", EVEN[8192], 16384, 4, 0, 1.07, 1.01),
    ("ISL 16384 std 0", NORMAL[0], 32768, 4, 0, 1.12, 1.09),
    ("ISL 16384 std 1024", NORMAL[1024], 32768, 4, 0, 1.11, 1.08),
    ("ISL 16384 std 2048", NORMAL[2048], 32768, 4, 0, 1.13, 1.11),
    ("ISL 16384 std 4096", NORMAL[4096], 32768, 4, 0, 1.18, 1.15),
    # TensorRT-LLM's reproduction script stores 256 - 2 x 64 experts on each of three ranks
    ("ISL 16384, DWDP3", EVEN[16384], 32768, 3, 128, 0.86, 1.093),
    ("ISL 16384, DWDP4", EVEN[16384], 32768, 4, 0, 1.15, 1.091),
)


@cache
def context_server() -> list[Row]:
    """Table 3: no slices. Lengths with a deviation are normal, cut at the maximum input length."""
    rows = []
    for case, lengths, budget, size, local, ttft, tps in TABLE_3:
        base = _serve(lengths, budget, "dep")
        found = _serve(lengths, budget, "dwdp", copies="serial", group_size=size, local_experts=local)
        rate = found.tokens_per_second_per_gpu / base.tokens_per_second_per_gpu
        rows.append(Row("P Table 3, TPS/GPU", case, tps, rate, "pt", 5))
        rows.append(Row("P Table 3, TTFT", case, ttft, base.percentile(50) / found.percentile(50), "pt", 5))
    return rows


# budget of a rank, requests, in flight, length, published ratio, limit, published seconds of DEP and DWDP
MI355X_RUNS = (
    (4096, 256, 128, 4096, 0.340, 25.0, 19.96, 58.78),
    (4096, 256, 128, 8192, 0.320, 25.0, 35.97, 112.42),
    (4096, 256, 128, 16384, 0.385, 25.0, 84.78, 220.41),
    (32768, 64, 32, 4096, 0.579, 25.0, 7.84, 13.55),
    (32768, 64, 32, 8192, 0.529, 25.0, 9.39, 17.73),
    (32768, 64, 32, 16384, 1.209, None, 20.07, 16.60),
    (32768, 64, 32, 32768, 1.637, None, 59.48, 36.34),
)


@cache
def mi355x() -> list[Row]:
    """AMD: DeepSeek-R1 MXFP4, DWDP8 against DEP8 with SGLang's all-gather, one-token answers.

    Their script leaves SGLang's `--max-prefill-tokens` at its default, 16,384. Prompts pass HTTP and the tokenizer
    one after another, so a rank's first forward has one prompt; any gap from 2 to 50 ms gives the same ratios to a few
    percent.
    """
    settings = {"exchange": "all-gather", "group_size": 8, "max_prefill_tokens": 16384, "frontend": 0.01}
    precision = Precision(FORMATS["mxfp4"], FORMATS["bf16"])
    rows, times = [], []
    for budget, requests, in_flight, length, ratio, limit, *published in MI355X_RUNS:
        load = {"token_budget": budget, "requests": requests, "concurrency": in_flight, **settings}
        case, lengths = f"{budget} tok/rank, ISL {length}", Lengths("fixed", length)
        found = []
        for mode, seconds in zip(("dep", "dwdp"), published, strict=True):
            found.append(simulate(Scenario(MODEL, get_gpu("MI355X"), precision, lengths, mode, **load)).seconds)
            times.append(Row("AMD, seconds of the run", f"{case}, {mode.upper()}8", seconds, found[-1]))
        rows.append(Row("AMD, tok/s over DEP", case, ratio, found[0] / found[1], "%", limit))
    return rows + times
