"""The planner's answers as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group as Stack
from rich.table import Table

from .cost import Estimate, Parts
from .outcome import Result
from .plan import Plan
from .profile import ALL_PEERS, Profile

# Narrow enough for eight columns on a terminal of 80.
STYLE: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 0, 0, 1), "pad_edge": False}
PART_LABELS = {
    "attention": "attention",
    "grouped_gemm": "experts",
    "dense_gemm": "dense GEMM",
    "other": "other kernels",
    "interference": "interference",
    "merge": "merge copy",
    "communication": "exchange",
    "synchronisation": "wait for slowest",
    "exposed_copy": "exposed copy",
}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds >= 1e-5 else "-"


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def plan_tables(plan: Plan) -> Stack:
    """Sweep, breakdown and memory of a plan, for a terminal."""
    sweep = Table(
        **STYLE,
        title=plan.title,
        caption="ms per forward of one rank; vs DEP: DWDP's tokens/s per GPU",
    )
    for label in ("tokens", "compute", "fetch", "exposed", "DWDP", "DEP", "in-tree", "replica"):
        sweep.add_column(label, justify="right")
    sweep.add_column("vs DEP", justify="right")
    for p in plan.points:
        sweep.add_row(
            f"{p.tokens:,}",
            _ms(p.dwdp.compute),
            _ms(p.dwdp.fetch),
            _ms(p.dwdp.parts.exposed_copy),
            _ms(p.dwdp.seconds),
            _ms(p.dep.seconds),
            _ms(p.in_tree.seconds),
            _ms(p.replica.seconds) if p.replica else "no room",
            f"{p.speedup:.2f}x",
        )
    chosen = plan.chosen
    parts = Table(
        **STYLE,
        title=f"Breakdown at {plan.chunk:,} tokens per rank",
        caption="ms per forward of one rank",
    )
    parts.add_column("part")
    shown: list[Estimate] = [chosen.dwdp, chosen.dep, chosen.in_tree]
    if chosen.replica:
        shown.append(chosen.replica)
    for estimate in shown:
        parts.add_column(estimate.scheme, justify="right")
    for field in fields(Parts):
        values = [getattr(e.parts, field.name) for e in shown]
        if any(values):
            parts.add_row(PART_LABELS[field.name], *(_ms(v) for v in values))
    parts.add_row("total", *(_ms(e.seconds) for e in shown), style="bold")
    memories = Table(**STYLE, title=f"Memory per GPU ({_gb(plan.case.gpu.memory)} GB)", caption="GB")
    memories.add_column("scheme")
    for label in ("replicated", "experts", "slots", "activations", "runtime", "for KV cache"):
        memories.add_column(label, justify="right")
    for scheme, m in plan.memories.items():
        left = _gb(m.kv_cache) if m.fits else "does not fit"
        row = [_gb(v) for v in (m.attention, m.experts, m.slots, m.activations, m.runtime)]
        memories.add_row(scheme, *row, left)
    return Stack(sweep, parts, memories)


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data; times in seconds, memory in bytes."""
    points = [
        {
            "tokens": p.tokens,
            "speedup_over_dep": p.speedup,
            **{
                e.scheme: {
                    "seconds": e.seconds,
                    "tokens_per_second_per_gpu": e.tokens_per_second,
                    "compute_seconds": e.compute,
                    "fetch_seconds": e.fetch,
                    "fetch_bytes": e.fetch_bytes,
                    "parts": asdict(e.parts),
                }
                for e in (p.dwdp, p.dep, p.in_tree, p.replica)
                if e is not None
            },
        }
        for p in plan.points
    ]
    return {
        "model": plan.case.model.name,
        "gpu": plan.case.gpu.name,
        "group_size": plan.group.size,
        "gpus": plan.gpus,
        "local_experts": plan.group.stored(plan.case.model),
        "depth": plan.group.depth,
        "expert_format": plan.case.precision.experts.name,
        "lengths": asdict(plan.case.lengths),
        "exchange": plan.case.exchange,
        "verdict": plan.verdict,
        "pays": plan.pays,
        "crossover_tokens_per_rank": plan.crossover,
        "copies_hidden_from_tokens_per_rank": plan.hidden_from,
        "chunked_prefill_size": plan.chunk,
        "direct_max_tokens": plan.direct_tokens,
        "flags": list(plan.flags),
        "memory_bytes": {scheme: asdict(m) for scheme, m in plan.memories.items()},
        "points": points,
        "sources": dict(plan.case.gpu.sources),
    }


def profile_lines(profile: Profile) -> list[str]:
    """What was measured and what it will replace, a line each."""
    known = profile.gpu if profile.gpu != "unknown" else "not one that the planner knows; name the closest with --gpu"
    lines = [
        f"{profile.device}: {known}",
        f"compute: measured with the shape of {profile.model}, bf16, torch {profile.torch}",
    ]
    for point in profile.copies:
        source = f"GPU {point.peer}" if point.peer != ALL_PEERS else "all peers at once"
        if not point.crosses_link:
            source = "itself (no link is crossed: planning keeps the data sheet's link)"
        lines.append(
            f"GPU {point.device} copies from {source}: {point.alone / 1e9:.0f} GB/s alone, "
            f"{point.under_compute / 1e9:.0f} GB/s under compute, which it slows by {point.compute_slowdown - 1:.1%}"
        )
    if not profile.copies:
        lines.append("copies: none measured: no GPU reaches another's memory")
    for read in profile.reads:
        lines.append(
            f"GPU {read.device} reads experts in place on GPU {read.peer}: {read.bytes_per_second / 1e9:.0f} GB/s "
            f"with {read.rows_per_expert} rows for each"
        )
    if profile.reads_failed:
        lines.append(f"reading in place: not measured: {profile.reads_failed}")
    return lines


def result_json(result: Result) -> dict[str, Any]:
    """A simulation's outcome as plain data; times in seconds."""
    s = result.scenario
    ranks = s.ranks
    return {
        "scenario": s.name,
        "mode": s.mode,
        "gpus": ranks,
        "requests": s.requests,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second_per_gpu": result.tokens_per_second_per_gpu,
        "ttft_seconds": {f"p{q}": result.percentile(q) for q in (10, 50, 90, 99)},
        "forwards": result.forwards,
        "exposed_copy_share": sum(result.exposed) / ranks / result.seconds,
        "copying_share": sum(result.copying) / ranks / result.seconds,
        "waiting_in_step_share": result.waited / ranks / result.seconds,
        "bytes_pulled_per_rank": sum(result.pulled) / ranks,
    }


def result_table(results: list[Result]) -> Table:
    """Outcomes of several scenarios side by side."""
    table = Table(
        **STYLE,
        title="Simulated prefill serving",
        caption="p50 to p99: TTFT in s; exposed: kernels wait for copies; copying: copy engines are busy; "
        "in step: ranks wait for the slowest (shares of the ranks' time)",
    )
    table.add_column("scenario")
    for label in ("GPUs", "tok/s/GPU", "p50", "p90", "p99", "exposed", "copying", "in step"):
        table.add_column(label, justify="right", no_wrap=True)
    for result in results:
        data = result_json(result)
        ttft = data["ttft_seconds"]
        table.add_row(
            str(data["scenario"]),
            str(data["gpus"]),
            f"{data['tokens_per_second_per_gpu']:,.0f}",
            *(f"{ttft[q]:.2f}" for q in ("p50", "p90", "p99")),
            *(f"{data[key]:.1%}" for key in ("exposed_copy_share", "copying_share", "waiting_in_step_share")),
        )
    return table
