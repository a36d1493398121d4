"""The engines' driver with fake engines: turns, failures, the time, and the tables."""

from __future__ import annotations

import time
from typing import Any

import pytest

from benchmarks.cases import parse_case
from benchmarks.engine import REPORT, Answer, Request
from benchmarks.engine_table import markdown
from benchmarks.processes import RunError
from benchmarks.turns import Result, Turns
from benchmarks.variants import Setting, Variant


class FakeEngine:
    """Prefills `speed` tokens a second; its counters grow with each request."""

    def __init__(self, name: str, calls: list[str], *, speed: float = 1000.0, fails_at: int = -1) -> None:
        self.name, self.calls, self.speed, self.fails_at = name, calls, speed, fails_at
        self.asked = 0
        self.closed = False

    def wait_ready(self, timeout_s: float) -> None:
        self.calls.append(f"{self.name} is ready")
        if self.fails_at == 0:
            raise RunError(f"{self.name} ended: CUDA out of memory")

    def ask(self, request: Request | str, timeout_s: float) -> Any:
        if request == REPORT:
            return [{"dwdp": {"rank": rank, "staged_forwards": self.asked * (rank + 1)}} for rank in (0, 1)]
        assert isinstance(request, Request)
        self.asked += 1
        self.calls.append(self.name)
        if self.asked == self.fails_at:
            raise RunError(f"{self.name} ended")
        if request.kind == "answers":
            logprob = -1.0 if self.name == "replicas" else -1.5
            return {rank: [Answer([7], [logprob], []) for _ in own] for rank, own in request.prompts.items()}
        if request.kind == "stream":
            return [[(0.0, 1), (1.0, request.new_tokens)] for own in request.prompts.values() for _ in own]
        return sum(len(prompt) for own in request.prompts.values() for prompt in own) / self.speed

    def close(self) -> None:
        self.closed = True


class Driver:
    """A run with fake engines."""

    def __init__(self, *cases: str, parity: bool = False, end: float = 1e9, **engines: dict[str, Any]) -> None:
        self.calls: list[str] = []
        self.starts: list[str] = []
        self.engines: list[FakeEngine] = []
        self.saved = 0
        self._specs = engines
        parsed = [parse_case(case) for case in cases]
        setting = Setting(2, 0, "model", False, parsed, prompts=3, decode_tokens=11, parity=parity)
        self.turns = Turns(
            setting,
            self._start,
            lambda _: {"memory_gib": [1.5], "untuned": "slow"},
            self._save,
            lambda _: None,
            repeats=2,
            start_s=5,
            end=end,
        )

    def _start(self, variant: Variant, index: int) -> FakeEngine:
        spec = self._specs[variant.name]
        if "unsupported" in spec:
            raise ValueError(spec["unsupported"])
        self.calls.append(f"{variant.name} starts")
        self.engines.append(FakeEngine(variant.name, self.calls, **spec))
        return self.engines[-1]

    def _save(self, result: Result) -> None:
        self.saved += 1

    def run(self, at_a_time: int = 4) -> Result:
        kinds = {"dwdp": "dwdp", "replicas": "replicas", "exchange": "dwdp-exchange", "pairs": "dwdp-exchange"}
        result = self.turns.run([Variant(name, kinds.get(name, "dep")) for name in self._specs], at_a_time)
        assert all(engine.closed for engine in self.engines)
        self.starts = [call for call in self.calls if " " in call]
        self.calls[:] = [call for call in self.calls if " " not in call]
        return result


def test_engines_take_turns_and_each_begins_once() -> None:
    driver = Driver("prefill:10", dwdp={"speed": 2000.0}, dep={})
    result = driver.run()
    assert driver.calls == ["dep", "dwdp", "dwdp", "dep", "dep", "dwdp"]  # warm-up, then two repeats
    assert result["cases"][0]["rates"] == {"dwdp": [2000.0, 2000.0], "dep": [1000.0, 1000.0]}
    assert result["variants"]["dwdp"]["memory_gib"] == [1.5]
    # Of the repeats alone, without the warm-up, rank by rank.
    assert result["cases"][0]["counters"] == {"dwdp": [{"staged_forwards": 2}, {"staged_forwards": 4}]}
    assert driver.saved >= 3


def test_engines_that_time_forwards_start_by_themselves() -> None:
    driver = Driver("prefill:10", dep={}, exchange={}, replicas={}, pairs={})
    result = driver.run()
    assert driver.starts[:4] == ["exchange starts", "exchange is ready", "pairs starts", "pairs is ready"]
    assert driver.starts[4:6] == ["dep starts", "replicas starts"]
    assert set(result["cases"][0]["rates"]) == {"dep", "exchange", "replicas", "pairs"}


def test_no_more_engines_at_a_time_than_asked_for() -> None:
    driver = Driver("prefill:10", dwdp={}, dep={}, replicas={})
    result = driver.run(at_a_time=2)
    assert driver.calls[-3:] == ["replicas"] * 3
    assert set(result["cases"][0]["rates"]) == {"dwdp", "dep", "replicas"}


def test_who_fails_is_left_out_and_the_others_go_on() -> None:
    driver = Driver(
        "prefill:10", "decode:2", dwdp={"fails_at": 0}, dep={"fails_at": 2}, tp={"unsupported": "no GPU"}, replicas={}
    )
    result = driver.run()
    assert result["variants"]["dwdp"]["error"] == "dwdp ended: CUDA out of memory"
    assert result["variants"]["dep"]["error"] == "dep ended"
    assert result["variants"]["tp"]["error"] == "cannot run: no GPU"
    assert [row["rates"] for row in result["cases"]] == [{"replicas": [1000.0] * 2}, {"replicas": [40.0] * 2}]
    text = markdown(result)
    assert "- dwdp: dwdp ended: CUDA out of memory" in text
    assert "- replicas: slow" in text
    assert "| decode:2 | 40 (±0 %) |" in text


def test_nothing_is_begun_when_the_time_is_over() -> None:
    driver = Driver("prefill:10", end=time.monotonic() - 1, dwdp={})
    assert driver.run()["variants"]["dwdp"]["error"] == "no time left"
    assert not driver.engines


def test_tokens_are_compared_with_those_of_replicas() -> None:
    result = Driver(parity=True, dwdp={}, replicas={}).run()
    assert result["tokens"]["dwdp"] == {"answers": 128, "same_tokens": 128, "bitwise": 0}
    assert result["tokens"]["replicas"]["bitwise"] == 128
    assert "| dwdp | 128 | 128 | 0 |" in markdown(result)
    assert "which has none" in Driver(parity=True, dwdp={}).run()["notes"][0]


def test_table_has_ratios_and_how_far_repeats_lie_apart() -> None:
    rates = {"dwdp": [90.0, 100.0, 110.0], "dep": [50.0], "replicas": [200.0, 200.0, 210.0]}
    result = {"variants": {name: {} for name in rates}, "notes": ["cut"]}
    text = markdown(result | {"cases": [{"case": "prefill:1", "rates": rates, "counters": {}}]})
    assert "| prefill:1 | 100 (2.00 dep, 0.50 replicas, ±20 %) | 50 (0.25 replicas) | 200 (4.00 dep, ±5 %) |" in text
    assert text.endswith("- cut\n")


@pytest.mark.parametrize(
    "counters", [{}, {"dwdp": [{"staged_forwards": 3, "joint_forwards": 2, "exposed_copy_s": 0.0015}]}]
)
def test_table_of_counters(counters: dict[str, Any]) -> None:
    row = {"case": "prefill:1", "rates": {"dwdp": [1.0]}, "counters": counters}
    text = markdown({"variants": {"dwdp": {}}, "cases": [row], "notes": []})
    assert ("| prefill:1 | dwdp | 3 | 0 | 2 | 0 | 1.5 |" in text) == bool(counters)
