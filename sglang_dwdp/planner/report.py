"""The planner's answers as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group as Stack
from rich.table import Table

from sglang_dwdp.planner.cost import Estimate, Parts
from sglang_dwdp.planner.decode import pays_from
from sglang_dwdp.planner.plan import Plan
from sglang_dwdp.planner.simulate import Result


def _table(title: str, caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """The first column is text, the others are figures; narrow enough for eight on a terminal of 80."""
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for index, label in enumerate(columns):
        table.add_column(label, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds >= 1e-5 else "-"


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def plan_tables(plan: Plan) -> Stack:
    """Sweep, breakdown and memory of a plan, for a terminal."""
    sweep = _table(
        plan.title,
        "ms per forward of one rank; together: --dwdp-exchange auto; vs DEP: DWDP's tokens/s per GPU",
        ("tokens", "compute", "fetch", "DWDP", "together", "DEP", "in-tree", "replica", "vs DEP"),
        (
            (
                f"{p.tokens:,}",
                *map(_ms, (p.dwdp.compute, p.dwdp.fetch, p.dwdp.seconds)),
                _ms(p.together.seconds) if p.together else "-",
                *map(_ms, (p.dep.seconds, p.in_tree.seconds)),
                _ms(p.replica.seconds) if p.replica else "no room",
                f"{p.speedup:.2f}x",
            )
            for p in plan.points
        ),
    )
    chosen = plan.chosen
    shown: list[Estimate] = [e for e in (chosen.dwdp, chosen.dep, chosen.in_tree, chosen.replica) if e]
    values = {f.name.replace("_", " "): [getattr(e.parts, f.name) for e in shown] for f in fields(Parts)}
    values = {label: row for label, row in values.items() if any(row)} | {"total": [e.seconds for e in shown]}
    parts = _table(
        f"Breakdown at {plan.chunk:,} tokens per rank",
        "ms per forward of one rank",
        ("part", *(e.scheme for e in shown)),
        ((label, *map(_ms, row)) for label, row in values.items()),
    )
    memories = _table(
        f"Memory per GPU ({_gb(plan.case.gpu.memory)} GB)",
        "GB",
        ("scheme", "replicated", "experts", "slots", "activations", "runtime", "for KV cache"),
        (
            (
                scheme,
                *map(_gb, (m.attention, m.experts, m.slots, m.activations, m.runtime)),
                _gb(m.kv_cache) if m.fits else "does not fit",
            )
            for scheme, m in plan.memories.items()
        ),
    )
    paying = pays_from(plan.decode)
    together = "never pays" if paying is None else f"pays from {paying} sequences a rank on"
    decode = _table(
        f"Decode after prompts of {plan.case.lengths.length:,.0f} tokens",
        f"ms per step; decoding together (--dwdp-exchange auto) {together}",
        ("sequences a rank", "DWDP alone", "DWDP together", "replica"),
        (
            (f"{s.sequences:,}", _ms(s.alone), _ms(s.together), _ms(s.replica) if chosen.replica else "no room")
            for s in plan.decode
        ),
    )
    return Stack(sweep, parts, memories, decode)


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data; times in seconds, memory in bytes."""
    points: list[dict[str, Any]] = []
    for p in plan.points:
        found = [e for e in (p.dwdp, p.together, p.dep, p.in_tree, p.replica) if e]
        schemes = {e.scheme: {"seconds": e.seconds, **asdict(e)} for e in found}
        points.append({"tokens": p.tokens, "speedup_over_dep": p.speedup, **schemes})
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
        "chunked_prefill_size": plan.chunk,
        "flags": list(plan.flags),
        "memory_bytes": {scheme: asdict(m) for scheme, m in plan.memories.items()},
        "points": points,
        "decode": [asdict(step) for step in plan.decode],
        "decoding_together_pays_from": pays_from(plan.decode),
        "sources": dict(plan.case.gpu.sources),
    }


def result_json(result: Result) -> dict[str, Any]:
    """A simulation's outcome as plain data; times in seconds."""
    s, ranks = result.scenario, result.scenario.ranks
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
        "exposed_copy_share": result.exposed / ranks / result.seconds,
        "copying_share": result.copying / ranks / result.seconds,
        "waiting_in_step_share": result.waited / ranks / result.seconds,
        "bytes_pulled_per_rank": result.pulled / ranks,
    }


def result_table(results: Sequence[Result]) -> Table:
    """Outcomes of several scenarios side by side."""
    shares = ("exposed_copy_share", "copying_share", "waiting_in_step_share")
    return _table(
        "Simulated prefill serving",
        "p50 to p99: TTFT in s; exposed: kernels wait for copies; copying: copy engines are busy; "
        "in step: ranks wait for the slowest (shares of the ranks' time)",
        ("scenario", "GPUs", "tok/s/GPU", "p50", "p90", "p99", "exposed", "copying", "in step"),
        (
            (
                str(data["scenario"]),
                str(data["gpus"]),
                f"{data['tokens_per_second_per_gpu']:,.0f}",
                *(f"{data['ttft_seconds'][q]:.2f}" for q in ("p50", "p90", "p99")),
                *(f"{data[key]:.1%}" for key in shares),
            )
            for data in map(result_json, results)
        ),
    )
