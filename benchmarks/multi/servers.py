"""Part c: all variants are started at once as engines, and then take turns, workload by workload."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines import (
    ANSWER_S,
    ByRank,
    EngineError,
    EngineProcess,
    answer_requests,
    engine_process,
    start_engine,
)
from benchmarks.multi import tokens
from benchmarks.multi.variants import REFERENCE, VARIANTS, engine_options, environment, why_not
from benchmarks.multi.workload import CPU_LOAD, DECODE_PROMPT, GPU_LOAD, Draws, Load, Prefill
from benchmarks.processes import tail

Result = dict[str, Any]
GRACE_S = 20.0  # what is under way at the end of the time may take so much longer


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and what. devices: GPUs; 0 for the CPU engine, 1 for one that all ranks share.

    start_s: for all engines to come up.  end: of the time (monotonic clock); nothing is begun after it.
    """

    names: tuple[str, ...]
    ranks: int
    devices: int
    model: str
    attention: str
    start_s: float
    end: float
    script: Path
    logs: Path

    @property
    def load(self) -> Load:
        return GPU_LOAD if self.devices else CPU_LOAD

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def serve(spec: str, descriptor: int) -> None:
    """In an engine's process. spec: JSON of `name`, `ranks`, `cpu`, `model`, `attention`."""
    given = json.loads(spec)
    load = CPU_LOAD if given["cpu"] else GPU_LOAD
    name = given["name"]
    options = engine_options(name, given["ranks"], load, given["model"], cpu=given["cpu"], attention=given["attention"])
    answer_requests(start_engine(options, VARIANTS.index(name)), descriptor)


class Comparison:
    """The engines that serve, and what was measured of them. An engine that fails is left out from then on."""

    def __init__(self, setting: Setting, say: Callable[[str], None], save: Callable[[Result], None]) -> None:
        self._setting, self._say, self._save = setting, say, save
        self._engines: dict[str, EngineProcess] = {}
        self._draws = Draws()
        self.result: Result = {
            "model": Path(setting.model).name,
            "attention": setting.attention,
            "chunk": setting.load.chunk,
            "variants": {},
            "tokens": {},
            "prefill": [],
            "decode": [],
            "notes": [],
        }

    def run(self) -> Result:
        """Start, measure, stop."""
        setting = self._setting
        with ExitStack() as stack:
            self._start(stack)
            steps: list[tuple[str, Callable[[], None]]] = [
                ("warming up", self._warm_up),
                ("tokens", self._compare_tokens),
            ]
            # Without variation first, and prefills before decodes: what matters most comes first.
            ordered = sorted(setting.load.prefills, key=lambda prefill: prefill.variation)
            steps += [(_label(prefill), lambda p=prefill: self._prefill(p)) for prefill in ordered]  # type: ignore[misc]
            steps += [(f"decode, {n} on a rank", lambda n=n: self._decode(n)) for n in setting.load.decodes]  # type: ignore[misc]
            for label, step in steps:
                if not self._engines:
                    break
                if setting.left <= 0:
                    self.result["notes"].append(f"no time left for: {label}")
                    continue
                self._say(f"{label} …")
                step()
                self._save(self.result)
            self._reports()
        return self.result

    def _start(self, stack: ExitStack) -> None:
        setting = self._setting
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        begin = time.monotonic()
        started = {}
        for name in setting.names:
            if why := why_not(name, setting.ranks, setting.devices):
                self.result["variants"][name] = {"error": f"cannot run: {why}"}
                continue
            directory = root / name
            directory.mkdir()
            spec = {"name": name, "ranks": setting.ranks, "cpu": not setting.devices}
            spec |= {"model": setting.model, "attention": setting.attention}
            command = [sys.executable, str(setting.script), "--engine", json.dumps(spec)]
            variables = environment(name, setting.ranks, setting.devices, directory, os.environ)
            started[name] = stack.enter_context(engine_process(name, command, variables, self._log(name)))
        self._say(f"starting {', '.join(started) or 'nothing'} …")
        deadline = begin + min(setting.start_s, max(0.0, setting.left))
        for name, engine in started.items():
            if engine.ready(deadline):
                self._engines[name] = engine
                self.result["variants"][name] = {"ready_s": time.monotonic() - begin}
            else:
                seconds = time.monotonic() - begin
                why = f"cannot run: its engine ended or was not ready after {seconds:.0f} s"
                self.result["variants"][name] = {"error": why, "log": tail(self._log(name))}
        self._save(self.result)

    def _log(self, name: str) -> Path:
        return self._setting.logs / f"engine_{name}.log"

    def _drop(self, name: str, error: EngineError) -> None:
        if self._engines.pop(name, None):
            self.result["variants"][name] |= {"error": str(error), "log": tail(self._log(name))}

    def _timeout(self) -> float:
        return min(ANSWER_S, max(0.0, self._setting.left) + GRACE_S)

    def _ask(self, name: str, prompts: ByRank, new_tokens: int) -> float | None:
        """Seconds; None where the engine failed, which is then left out."""
        try:
            return self._engines[name].run(prompts, new_tokens, timeout_s=self._timeout())[0]
        except EngineError as error:
            self._drop(name, error)
            return None

    def _warm_up(self) -> None:
        """Every workload once on all engines at the same time: they compile side by side."""
        load, ranks = self._setting.load, range(self._setting.ranks)

        def one(name: str) -> None:
            draws = Draws(1)
            for length in sorted({prefill.length for prefill in load.prefills}):
                if name in self._engines:
                    self._ask(name, {rank: [draws.prompt(length)] for rank in ranks}, 1)
            for count in load.decodes:
                if name in self._engines:
                    self._ask(name, {rank: [draws.prompt(DECODE_PROMPT) for _ in range(count)] for rank in ranks}, 4)

        names = list(self._engines)
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(one, names))

    def _compare_tokens(self) -> None:
        """Every prompt on all ranks at once, prompt by prompt."""
        load, ranks = self._setting.load, range(self._setting.ranks)
        prompts = [self._draws.prompt(length) for length in load.compared]
        answers: dict[str, dict[int, list[Any]]] = {}
        for name in list(self._engines):
            mine: dict[int, list[Any]] = {rank: [] for rank in ranks}
            try:
                for prompt in prompts:
                    given = {rank: [prompt] for rank in ranks}
                    _, found = self._engines[name].run(
                        given, load.compared_tokens, logprobs=True, timeout_s=self._timeout()
                    )
                    for rank in ranks:
                        mine[rank] += found[rank]
                answers[name] = mine
            except EngineError as error:
                self._drop(name, error)
        reference = next((name for name in (*REFERENCE, *answers) if name in answers), None)
        if reference is not None:
            expected = answers[reference][0]
            self.result["reference"] = reference
            self.result["tokens"] = {name: tokens.compare(mine, expected) for name, mine in answers.items()}

    def _turns(self, repeat: int) -> list[str]:
        # Each time another variant begins, and is the one that finds the GPUs as the last workload left them.
        names = list(self._engines)
        first = repeat % max(1, len(names))
        return names[first:] + names[:first]

    def _prefill(self, prefill: Prefill) -> None:
        load = self._setting.load
        lengths = prefill.drawn(self._setting.ranks)
        times: dict[str, list[float]] = {}
        for repeat in range(load.warm_up + load.repeats):
            for name in self._turns(repeat):
                seconds = self._ask(name, self._draws.for_ranks(lengths), 1)
                if seconds is not None and repeat >= load.warm_up:
                    times.setdefault(name, []).append(seconds)
        total = sum(map(sum, lengths))
        row = {"length": prefill.length, "variation": prefill.variation, "prompts": prefill.prompts}
        self.result["prefill"].append({**row, "lengths": lengths, **_rates(times, total)})

    def _decode(self, count: int) -> None:
        load = self._setting.load
        lengths = [[DECODE_PROMPT] * count for _ in range(self._setting.ranks)]
        times: dict[str, list[float]] = {}
        for repeat in range(load.warm_up + load.repeats):
            for name in self._turns(repeat):
                given = self._draws.for_ranks(lengths)
                whole = self._ask(name, given, load.steps + 1)
                first = self._ask(name, given, 1) if whole is not None else None
                if whole is None or first is None or repeat < load.warm_up:
                    continue
                if whole > first:
                    times.setdefault(name, []).append(whole - first)
                else:
                    self.result["notes"].append(f"{name}, decode of {count}: a repeat is lost in noise, left out")
        total = self._setting.ranks * count * load.steps
        self.result["decode"].append({"sequences": count, **_rates(times, total)})

    def _reports(self) -> None:
        with ThreadPoolExecutor(max(1, len(self._engines))) as pool:
            asked = {name: pool.submit(engine.stop, GRACE_S) for name, engine in self._engines.items()}
            for name, reports in asked.items():
                try:
                    self.result["variants"][name]["reports"] = reports.result()
                except EngineError as error:
                    self.result["notes"].append(f"no reports: {error}")
        self._save(self.result)


def _label(prefill: Prefill) -> str:
    return f"prefill, {prefill.length} tokens" + (f", {prefill.variation:.0%} variation" if prefill.variation else "")


def _rates(times: dict[str, list[float]], total: int) -> Result:
    """Tokens per second of all ranks together, from medians."""
    return {"times_s": times, "tokens_per_s": {name: total / statistics.median(found) for name, found in times.items()}}
