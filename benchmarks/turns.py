"""Engines that are all started first and then take turns, case by case.

The speed of a host drifts by tens of percent within minutes, which would pass for a difference between engines that
are measured one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from benchmarks.cases import PARITY_TOKENS, Case, Draws, decode_rate, parity_prompts, same_answers
from benchmarks.engine import ANSWER_S, REPORT, Request
from benchmarks.processes import RunError
from benchmarks.variants import TIMED, Setting, Variant

Result = dict[str, Any]
GRACE_S = 20.0  # what is under way at the end of the time may take so much longer


class Engine(Protocol):
    """What `engine.EngineProcess` is to the driver."""

    def wait_ready(self, timeout_s: float) -> None:
        """Return when it has started, or raise `RunError`."""

    def ask(self, request: Request | str, timeout_s: float) -> Any:
        """The answer to a request, or `RunError`."""

    def close(self) -> None:
        """End it."""


class Turns:
    """One run of the driver; `result` grows as it goes.

    Args:
        setting: What all variants have in common.
        start: Starts a variant's engine; `ValueError` where the variant cannot run.
        about: What is to be said of an engine that has started, for `variants`.
        save: Called with the result whenever something was added.
        say: Called with a line of progress.
        repeats: Of each case, for each engine.
        start_s: Seconds for an engine to start.
        end: Of the time (monotonic clock); nothing is begun after it.
    """

    def __init__(
        self,
        setting: Setting,
        start: Callable[[Variant, int], Engine],
        about: Callable[[Engine], Result],
        save: Callable[[Result], None],
        say: Callable[[str], None],
        *,
        repeats: int,
        start_s: float,
        end: float,
    ) -> None:
        self._setting, self._start, self._about = setting, start, about
        self._save, self._say = save, say
        self._repeats, self._start_s, self._end = repeats, start_s, end
        self._engines: dict[str, Engine] = {}
        self._draws = Draws()
        self._answers: dict[str, Any] = {}
        rows: dict[str, Result] = {
            case.name: {"case": case.name, "rates": {}, "counters": {}} for case in setting.cases
        }
        self.result: Result = {"variants": {}, "cases": list(rows.values()), "notes": []}
        self._rows = rows

    def run(self, variants: Sequence[Variant], at_a_time: int) -> Result:
        """Measure the variants, `at_a_time` of them beside each other.

        Returns:
            `variants`: by name `start_s`, `about`'s, `states`, `error`. `cases`: `case`; by variant `rates`, tokens
            per second of all ranks in each repeat; by DWDP variant `counters` of each rank. `tokens`: by variant, see
            `same_answers`. `notes`.
        """
        for first in range(0, len(variants), at_a_time):
            group = variants[first : first + at_a_time]
            try:
                self._start_all(group)
                if self._setting.parity:
                    self._parity()
                for case in self._setting.cases:
                    self._case(case, group)
                self._states(group)
            finally:
                with ThreadPoolExecutor(at_a_time) as pool:
                    list(pool.map(lambda engine: engine.close(), self._engines.values()))
                self._engines.clear()
        return self.result

    @property
    def _left(self) -> float:
        return self._end - time.monotonic()

    def _note(self, text: str) -> None:
        self._say(text)
        self.result["notes"].append(text)

    def _start_all(self, group: Sequence[Variant]) -> None:
        numbered = list(enumerate(group))
        quiet = [one for one in numbered if one[1].kind in TIMED]
        for wave in filter(None, (*([one] for one in quiet), [one for one in numbered if one not in quiet])):
            self._start_beside(wave)
        self._save(self.result)

    def _start_beside(self, numbered: Sequence[tuple[int, Variant]]) -> None:
        begin = time.monotonic()
        self._say(f"starting {', '.join(variant.name for _, variant in numbered)}")
        found: dict[str, Result] = self.result["variants"]
        for index, variant in numbered:
            entry: Result = {"kind": variant.kind, "options": dict(variant.options)}
            found[variant.name] = entry | {"environment": dict(variant.environment)}
            if self._left <= 0:
                found[variant.name]["error"] = "no time left"
                continue
            try:
                self._engines[variant.name] = self._start(variant, index)
            except (ValueError, RunError) as error:
                found[variant.name]["error"] = f"cannot run: {error}"
        deadline = begin + min(self._start_s, max(0.0, self._left))

        def wait(name: str) -> None:
            try:
                self._engines[name].wait_ready(max(0.0, deadline - time.monotonic()))
                found[name]["start_s"] = round(time.monotonic() - begin, 1)
            except RunError as error:
                self._drop(name, error)

        names = [variant.name for _, variant in numbered if variant.name in self._engines]
        with ThreadPoolExecutor(max(1, len(names))) as pool:
            list(pool.map(wait, names))
        for name in (name for name in names if name in self._engines):
            about = self._about(self._engines[name])
            self._say(f"{name}: started in {found[name]['start_s']} s, {about}")
            found[name] |= about

    def _drop(self, name: str, error: Exception) -> None:
        self.result["variants"][name]["error"] = str(error)
        self._say(f"{name}: {error}")
        self._engines.pop(name).close()

    def _ask(self, name: str, request: Request | str) -> Any:
        """The answer; None where the engine failed, which is then left out."""
        try:
            return self._engines[name].ask(request, min(ANSWER_S, max(0.0, self._left) + GRACE_S))
        except RunError as error:
            self._drop(name, error)
            return None

    def _case(self, case: Case, group: Sequence[Variant]) -> None:
        if not self._engines:
            return
        if self._left <= 0:
            self._note(f"no time left for {case.name}")
            return
        lengths = case.lengths(self._setting.ranks, self._setting.prompts)
        dwdp = [variant.name for variant in group if variant.is_dwdp and variant.name in self._engines]
        row = self._rows[case.name]
        before: dict[str, Any] = {}
        for repeat in range(-1, self._repeats):  # -1: the same load, to warm up
            if repeat == 0:
                before = {name: self._counters(name) for name in dwdp}
            # Each time another engine begins, and is the one that finds the GPUs as the case before left them.
            names = list(self._engines)
            turn = repeat % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                if self._left <= 0:
                    break
                rate = self._rate(name, case, lengths)
                if rate is not None and repeat >= 0:
                    row["rates"].setdefault(name, []).append(rate)
        for name in dwdp:
            after = self._counters(name)
            if after and before.get(name):
                row["counters"][name] = [counted(*pair) for pair in zip(after, before[name], strict=True)]
        rates = {name: [round(rate) for rate in found] for name, found in row["rates"].items()}
        self._say(f"{case.name}: " + ", ".join(f"{name} {found}" for name, found in rates.items()))
        self._save(self.result)

    def _rate(self, name: str, case: Case, lengths: Sequence[Sequence[int]]) -> float | None:
        prompts = self._draws.by_rank(lengths)
        if case.kind == "prefill":
            seconds = self._ask(name, Request("batch", prompts, 1))
            return None if seconds is None else sum(map(sum, lengths)) / seconds
        timelines = self._ask(name, Request("stream", prompts, self._setting.decode_tokens))
        try:
            return None if timelines is None else decode_rate(timelines)
        except ValueError as error:
            self._note(f"{name}, {case.name}: {error}")
            return None

    def _counters(self, name: str) -> list[dict[str, Any]]:
        """Reports of the ranks of a DWDP engine, in their order; none where it has failed."""
        states = self._ask(name, REPORT) if name in self._engines else None
        return [state["dwdp"] for state in states or ()]

    def _parity(self) -> None:
        prompts = parity_prompts(self._setting.parity_longest)
        request = Request("answers", dict.fromkeys(range(self._setting.ranks), prompts), PARITY_TOKENS)
        for name in list(self._engines):
            if self._left > 0 and (found := self._ask(name, request)) is not None:
                self._answers[name] = found
                self._say(f"{name}: answered {len(prompts)} prompts on each rank")
        self.result["answers"] = self._answers
        if (reference := self._answers.get("replicas")) is not None:
            self.result["tokens"] = {name: same_answers(found, reference[0]) for name, found in self._answers.items()}
        else:
            self._note("tokens are compared with those of the variant `replicas`, which has none")
        self._save(self.result)

    def _states(self, group: Sequence[Variant]) -> None:
        for variant in group:
            if variant.name in self._engines and (states := self._ask(variant.name, REPORT)) is not None:
                kept = [{key: state.get(key) for key in ("dwdp", "memory_usage")} for state in states]
                self.result["variants"][variant.name]["states"] = kept
        self._save(self.result)


def counted(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """What a rank's counters counted between two reports of DWDP; a setting that is a number counts 0."""
    return {
        key: value - before.get(key, 0)
        for key, value in after.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "rank"
    }
