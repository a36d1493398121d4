"""Set the planner and the simulator beside what others have published, with the errors.

    python benchmarks/reproduce_paper.py [--json FILE] [--requests N]

Constants come from Table 1 of the DWDP paper (arXiv 2604.01621) alone, through
``sglang_dwdp.planner.calibrate``; every other figure is predicted. Published figures: the paper,
TensorRT-LLM's blog 19, and SGLang's ROCm results (sgl-project/sglang#33310).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_dwdp.planner.calibrate import (
    PAPER_PRECISION,
    TABLE_1_DEP,
    TABLE_1_DWDP,
    TOKEN_BUDGETS,
    calibrate,
    table_1_length_wait,
    table_1_rounds,
)
from sglang_dwdp.planner.contention import contention_probabilities, simulated_contention
from sglang_dwdp.planner.cost import Group, dwdp
from sglang_dwdp.planner.dep import dep, expert_wait
from sglang_dwdp.planner.formats import FORMATS, Precision
from sglang_dwdp.planner.gpus import get_gpu, roofline_gpu
from sglang_dwdp.planner.models import load_model
from sglang_dwdp.planner.scenario import Scenario
from sglang_dwdp.planner.simulate import simulate
from sglang_dwdp.planner.workload import Lengths, batch_of, mean_batch

MODEL = load_model("deepseek-r1")
GB200 = get_gpu("GB200")


@dataclass(frozen=True)
class Row:
    """One figure of theirs and ours, and how far apart they may be.

    ``kind``: ``points`` compares 100 x (ours - theirs), ``percent`` the relative error. ``limit`` is
    None where the figure served to calibrate or is shown for information.
    """

    table: str
    case: str
    theirs: float
    ours: float
    kind: str
    limit: float | None

    @property
    def error(self) -> float:
        """In percent or in points of the ratio."""
        if self.kind == "points":
            return 100 * (self.ours - self.theirs)
        return 100 * (self.ours / self.theirs - 1)

    @property
    def holds(self) -> bool | None:
        """Whether the error is within the limit; None without one."""
        return None if self.limit is None else abs(self.error) <= self.limit + 1e-9


def table_1() -> list[Row]:
    """The calibration itself: DEP must come back, the naive DWDP is half predicted.

    DEP's wait is the one of an iteration whose ranks' lengths vary by 20 %, as calibrated; the
    forward of ranks that pack evenly (variation 3 %) is shown beside it.
    """
    rounds = table_1_rounds()
    theirs_dep, theirs_dwdp = TABLE_1_DEP, TABLE_1_DWDP
    ours_dep = dep(MODEL, GB200, PAPER_PRECISION, rounds)
    group = Group(4, copies="serial", merge_copy=True)
    ours = dwdp(MODEL, GB200, PAPER_PRECISION, mean_batch(rounds), group)
    name = "P Table 1, ms"
    parts = ours_dep.parts
    skew = expert_wait(MODEL, GB200, 4, parts.grouped_gemm)
    wait = table_1_length_wait(parts) + skew
    as_profiled = ours_dep.compute + parts.communication + wait
    figures = (
        ("DEP4 attention", theirs_dep.attention, parts.attention),
        ("DEP4 grouped GEMM", theirs_dep.grouped_gemm, parts.grouped_gemm),
        ("DEP4 dense GEMM", theirs_dep.dense_gemm, parts.dense_gemm),
        ("DEP4 others", theirs_dep.other, parts.other),
        ("DEP4 communication", theirs_dep.communication, parts.communication),
        ("DEP4 synchronisation at 20 % length CV", theirs_dep.synchronisation, wait),
        ("DEP4 forward at 20 % length CV", theirs_dep.total, as_profiled),
        ("DEP4 forward, packed (3 % CV)", theirs_dep.total, ours_dep.seconds),
        ("DWDP4 P2P copy, contended", theirs_dwdp.copy, ours.fetch),
        ("DWDP4 merge copy (predicted)", 0.034, ours.parts.merge),
        ("naive DWDP4 forward", theirs_dwdp.total, ours.seconds),
    )
    return [Row(name, case, 1e3 * theirs, 1e3 * mine, "percent", None) for case, theirs, mine in figures]


CONTENTION = {
    3: (50.00, 50.00),
    4: (44.44, 44.44, 11.11),
    6: (40.96, 40.96, 15.36, 2.56, 0.16),
    8: (39.66, 39.66, 16.52, 3.67, 0.46, 0.03),
    12: (38.55, 38.55, 17.35, 4.63, 0.81, 0.097),
    16: (38.06, 38.06, 17.67, 5.05, 0.99, 0.14),
}


def table_2() -> list[Row]:
    """Contention probabilities in percent, from the formula and counted."""
    rows = []
    for size, theirs in CONTENTION.items():
        exact = contention_probabilities(size)
        counted = simulated_contention(size, rounds=12_000_000 // size)
        for level, value in enumerate(theirs, start=1):
            case = f"DWDP{size} Pr[C={level}]"
            # shares as fractions, so that a point is a percentage point
            for how, ours in (("analytic", exact), ("simulated", counted)):
                rows.append(Row(f"P Table 2, {how}", case, value / 100, ours[level - 1], "points", 0.1))
    return rows


def roofline() -> list[Row]:
    """Blog 19 Table 1 by the definition of the paper's section 3.

    Peaks for every efficiency; attention and MoE operators of the 58 MoE layers only; one copy of
    a token per routed expert, NVFP4 out and bf16 back; T_DWDP = max(compute, fetch), T_DEP =
    compute + exchange. The checkpoint's attention runs in bf16 here.
    """
    model = replace(MODEL, layers=MODEL.moe_layers, dense_layers=0)
    gpu = roofline_gpu(GB200)
    precision = Precision(FORMATS["nvfp4"], FORMATS["bf16"], dispatch_bytes=0.5625)
    theirs = {1024: (0.19, 0.10), 8192: (0.62, 0.73), 16384: (1.52, 1.27), 32768: (4.77, 1.17)}
    rows = []
    for length, (ratio, speedup) in theirs.items():
        batch = batch_of([(length, 0)])
        local = dwdp(model, gpu, precision, batch, Group(4))
        remote = dep(model, gpu, precision, [[batch] * 4], "all-copies")
        compute = local.compute - local.parts.other  # the roofline counts no small kernels
        exchanged = remote.seconds - remote.parts.other
        slower = max(compute, local.fetch)
        rows.append(Row("B Table 1, compute / fetch", f"ISL {length}", ratio, compute / local.fetch, "percent", None))
        rows.append(Row("B Table 1, speed-up", f"ISL {length}", speedup, exchanged / slower, "percent", 10))
    return rows


def _serve(lengths: Lengths, budget: int, requests: int, mode: str, **settings: object) -> Scenario:
    """A context server as in TensorRT-LLM's examples/dwdp: 256 requests in flight, no chunking."""
    return Scenario(
        model=MODEL,
        gpu=GB200,
        precision=PAPER_PRECISION,
        lengths=lengths,
        mode=mode,
        token_budget=TOKEN_BUDGETS[budget],
        chunked=False,
        requests=requests,
        concurrency=256,
        order="random",
        **settings,  # type: ignore[arg-type]
    )


def ablation(requests: int) -> list[Row]:
    """Table 4: TPS/GPU over DEP, with merge elimination, and with slices as well."""
    rows = []
    theirs = {
        (0.5, 16384): (0.995, 1.081),
        (0.5, 32768): (1.140, 1.139),
        (0.8, 16384): (1.039, 1.053),
        (0.8, 32768): (1.098, 1.109),
    }
    for (ratio, budget), values in theirs.items():
        lengths = Lengths("uniform", 8192, ratio=ratio)
        base = simulate(_serve(lengths, budget, requests, "dep")).tokens_per_second_per_gpu
        for copies, value, name in zip(("serial", "sliced"), values, ("merge elim.", "+ slices"), strict=True):
            ours = simulate(_serve(lengths, budget, requests, "dwdp", copies=copies))
            case = f"ratio {ratio}, MNT {budget // 1024}K, {name}"
            rows.append(Row("P Table 4, TPS/GPU", case, value, ours.tokens_per_second_per_gpu / base, "points", 5))
    return rows


def context_server(requests: int) -> list[Row]:
    """Table 3: no slices. Lengths with a deviation are normal, cut at the maximum input length."""
    even = [(n, Lengths("uniform", n, ratio=0.8)) for n in (1024, 8192, 16384, 32768)]
    cases = [
        (f"ISL {n}", lengths, 32768, 4, 0, ttft, tps)
        for (n, lengths), (ttft, tps) in zip(
            even, ((1.27, 1.11), (1.16, 1.10), (1.12, 1.09), (1.11, 1.09)), strict=True
        )
    ]
    cases.append(("ISL 8192, MNT 16K", even[1][1], 16384, 4, 0, 1.07, 1.01))
    for std, ttft, tps in ((0, 1.12, 1.09), (1024, 1.11, 1.08), (2048, 1.13, 1.11), (4096, 1.18, 1.15)):
        cases.append((f"ISL 16384 std {std}", Lengths("normal", 16384, std=std, limit=16384), 32768, 4, 0, ttft, tps))
    # TensorRT-LLM's reproduction script stores 256 - 2 x 64 experts on each of three ranks
    cases.append(("ISL 16384, DWDP3", even[2][1], 32768, 3, 128, 0.86, 1.093))
    cases.append(("ISL 16384, DWDP4", even[2][1], 32768, 4, 0, 1.15, 1.091))
    rows = []
    for case, lengths, budget, size, local, ttft, tps in cases:
        base = simulate(_serve(lengths, budget, requests, "dep"))
        ours = simulate(
            _serve(lengths, budget, requests, "dwdp", copies="serial", group_size=size, local_experts=local)
        )
        rate = ours.tokens_per_second_per_gpu / base.tokens_per_second_per_gpu
        rows.append(Row("P Table 3, TPS/GPU", case, tps, rate, "points", 5))
        rows.append(Row("P Table 3, TTFT", case, ttft, base.percentile(50) / ours.percentile(50), "points", 5))
    return rows


def mi355x() -> list[Row]:
    """AMD: DeepSeek-R1 MXFP4, DWDP8 against DEP8 with SGLang's all-gather, one-token answers."""
    gpu = get_gpu("MI355X")
    precision = Precision(FORMATS["mxfp4"], FORMATS["bf16"])
    runs = (
        (4096, 256, 128, 4096, 0.340, 25.0),
        (4096, 256, 128, 8192, 0.320, 25.0),
        (4096, 256, 128, 16384, 0.385, 25.0),
        (32768, 64, 32, 4096, 0.579, 25.0),
        (32768, 64, 32, 8192, 0.529, 25.0),
        (32768, 64, 32, 16384, 1.209, None),
        (32768, 64, 32, 32768, 1.637, None),
    )
    rows = []
    for budget, requests, concurrency, length, theirs, limit in runs:
        common = Scenario(
            model=MODEL,
            gpu=gpu,
            precision=precision,
            lengths=Lengths("fixed", length),
            mode="dep",
            exchange="all-gather",
            group_size=8,
            token_budget=budget,
            requests=requests,
            concurrency=concurrency,
        )
        base = simulate(common).tokens_per_second_per_gpu
        ours = simulate(replace(common, mode="dwdp")).tokens_per_second_per_gpu
        rows.append(
            Row(
                "AMD, tok/s over DEP",
                f"{budget} tok/rank, ISL {length}",
                theirs,
                ours / base,
                "percent",
                limit,
            )
        )
    return rows


NOTES = (
    "P Tables 3 and 4: TTFT and TPS/GPU of one closed loop cannot differ by as much as the paper's do (8K: 1.16 and "
    "1.10). Its iteration ratio (Table 1: 1.166) agrees with the TTFT, ours here with the TPS/GPU: the profiled "
    "iteration waited for lengths that vary by 20 %, saturated ranks that pack ratio 0.8 vary by 3 %.",
    "AMD at 32,768 tokens per rank: 64 prompts, 32 in flight. The published times equal about one fetch-bound "
    "forward per prompt and rank; the simulated ranks batch the waiting prompts. Lengths are taken as fixed.",
)


def main() -> int:
    """Print all tables; exit code 0 whatever the errors, which are the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="benchmarks/results/reproduce_paper.json", metavar="FILE")
    parser.add_argument("--requests", type=int, default=4096, help="per simulated server (theirs: 4,096)")
    args = parser.parse_args()
    console = Console(width=120)
    rows = [
        *table_1(),
        *table_2(),
        *roofline(),
        *ablation(args.requests),
        *context_server(args.requests),
        *mi355x(),
    ]
    by_table: dict[str, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    for title, members in by_table.items():
        table = Table(title=title, title_justify="left")
        table.add_column("case", min_width=36)
        for label in ("theirs", "ours", "error", "limit", "holds"):
            table.add_column(label, justify="right")
        for row in members:
            unit = "pt" if row.kind == "points" else "%"
            limit = "-" if row.limit is None else f"{row.limit:g} {unit}"
            holds = {None: "-", True: "yes", False: "[red]no[/red]"}[row.holds]
            digits = 5 if "Table 2" in title else 3
            table.add_row(
                row.case,
                f"{row.theirs:.{digits}g}" if digits == 3 and row.theirs > 10 else f"{row.theirs:.{digits}f}",
                f"{row.ours:.{digits}f}",
                f"{row.error:+.2f} {unit}",
                limit,
                holds,
            )
        console.print(table)
    judged = [row for row in rows if row.holds is not None]
    console.print(f"{sum(bool(row.holds) for row in judged)} of {len(judged)} figures within their limits")
    for note in NOTES:
        console.print("- " + note)
    target = Path(args.json)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "calibration": {k: v for k, v in vars(calibrate()).items() if k != "efficiency"}
        | {"efficiency": vars(calibrate().efficiency)},
        "rows": [{**vars(row), "error": row.error, "holds": row.holds} for row in rows],
        "notes": NOTES,
    }
    target.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
