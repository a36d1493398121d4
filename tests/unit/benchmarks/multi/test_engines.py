"""Engines that take turns, with a process in an engine's place: answers, failures, and that nothing is left."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import multi_gpu
from benchmarks.engines import EngineError, EngineProcess, engine_process
from benchmarks.multi.servers import Comparison, Setting
from benchmarks.processes import tail

FAKE = """
import asyncio, sys, time
from benchmarks.engines import answer_requests

mode = sys.argv[1]
print("starting", mode, flush=True)
if mode == "ends":
    sys.exit("no engine today")
if mode == "hangs":
    time.sleep(100)

class Engine:
    loop = asyncio.new_event_loop()

    async def async_generate(self, input_ids, sampling_params, routed_dp_rank, **options):
        count = sampling_params["max_new_tokens"]
        if mode == "fails" and len(input_ids[0]) > 3:
            print("Scheduler hit an exception: by design", flush=True)
            time.sleep(100)
        wrong = 1 if mode == "differs" and routed_dp_rank else 0
        meta = {}
        if options:
            meta["output_token_logprobs"] = [(-0.5, 1, None)] * count
            meta["output_top_logprobs"] = [[(-0.5, len(input_ids[0]), None), (-2.0, 7, None)]] * count
        return [{"output_ids": [len(prompt) + wrong] * count, "meta_info": meta} for prompt in input_ids]

    def get_server_info(self):
        return {"internal_states": [{"dwdp": {"rank": 0}}, {}]}

    def shutdown(self):
        print("shut down", flush=True)

answer_requests(Engine(), int(sys.argv[sys.argv.index("--connection") + 1]), lambda request: request + "!")
"""


def command(mode: str) -> list[str]:
    return [sys.executable, "-c", FAKE, mode]


def test_an_engine_answers_by_rank_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with engine_process("one", command("works"), {}, log) as engine:
        assert engine.ready(time.monotonic() + 30)
        seconds, answers = engine.run({0: [[1, 2], [3]], 2: [[4, 5, 6]]}, 2)
        assert seconds > 0
        assert {rank: [answer.tokens for answer in mine] for rank, mine in answers.items()} == {
            0: [[2, 2], [1, 1]],
            2: [[3, 3]],
        }
        assert answers[0][0].logprobs == []
        _, answers = engine.run({0: [[9]]}, 1, logprobs=True)
        assert answers[0][0].logprobs == [-0.5]
        assert answers[0][0].top == [[(-0.5, 1), (-2.0, 7)]]
        assert engine.ask("hello") == "hello!"
        assert engine.stop() == [{"rank": 0}, None]
        with pytest.raises(EngineError, match="ended"):
            engine.run({0: [[1]]}, 1, timeout_s=30)
    assert tail(log, 1) == ["shut down"]
    assert tail(tmp_path / "none") == []


@pytest.mark.parametrize(("mode", "within"), [("ends", 30), ("hangs", 1)])
def test_an_engine_that_does_not_come_up(mode: str, within: float, tmp_path: Path) -> None:
    with engine_process("one", command(mode), {}, tmp_path / "log") as engine:
        begin = time.monotonic()
        assert not engine.ready(begin + within)
        assert time.monotonic() - begin < 20


def test_a_failed_scheduler_is_noticed_before_its_process_ends(tmp_path: Path) -> None:
    with engine_process("one", command("fails"), {}, tmp_path / "log") as engine:
        assert engine.ready(time.monotonic() + 30)
        engine.run({0: [[1]]}, 1)
        begin = time.monotonic()
        with pytest.raises(EngineError, match="a scheduler of one failed"):
            engine.run({0: [[1, 2, 3, 4]]}, 1)
        assert time.monotonic() - begin < 10


class Fakes(Comparison):
    """A comparison whose engines are fakes: by name, how each behaves."""

    modes: dict[str, str]

    def _start(self, stack: Any) -> None:
        for name, mode in self.modes.items():
            log = self._log(name)
            engine: EngineProcess = stack.enter_context(engine_process(name, command(mode), {}, log))
            assert engine.ready(time.monotonic() + 60)
            self._engines[name] = engine
            self.result["variants"][name] = {"ready_s": 0.0}


def compare(modes: dict[str, str], tmp_path: Path, seconds: float = 100) -> tuple[dict[str, Any], int]:
    end = time.monotonic() + seconds
    setting = Setting(tuple(modes), 2, 0, "M", "triton", 60, end, Path("none"), tmp_path)
    saved: list[int] = []
    fakes = Fakes(setting, lambda _text: None, lambda result: saved.append(len(result["prefill"])))
    fakes.modes = modes
    return fakes.run(), len(saved)


def test_one_failing_engine_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    result, saved = compare({"dwdp": "works", "in-tree": "fails", "dep": "differs", "replicas": "works"}, tmp_path)
    assert "a scheduler of in-tree failed" in result["variants"]["in-tree"]["error"]
    assert any("by design" in line for line in result["variants"]["in-tree"]["log"])
    assert result["reference"] == "replicas"
    assert "in-tree" not in result["tokens"]
    assert result["tokens"]["dwdp"]["same_tokens"] == result["tokens"]["dwdp"]["answers"] == 6
    assert result["tokens"]["dep"]["same_tokens"] == 3
    assert len(result["prefill"]) == 4
    for row in (*result["prefill"], *result["decode"]):
        assert "in-tree" not in row["times_s"]
    for row in result["prefill"]:
        assert row["tokens_per_s"].keys() == {"dwdp", "dep", "replicas"}
    assert result["variants"]["dwdp"]["reports"] == [{"rank": 0}, None]
    assert saved >= 8  # after every step


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    result, _ = compare({"dwdp": "works"}, tmp_path, seconds=-1)
    assert result["prefill"] == result["decode"] == []
    assert sum("no time left" in note for note in result["notes"]) == 8
    assert result["variants"]["dwdp"]["reports"]


def test_processes_of_a_session_are_gone(tmp_path: Path) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
    with engine_process("one", [sys.executable, "-c", code], {}, tmp_path / "log"):
        deadline = time.monotonic() + 30
        while not tail(tmp_path / "log") and time.monotonic() < deadline:
            time.sleep(0.05)
        (child,) = map(int, tail(tmp_path / "log"))
        os.kill(child, 0)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} is left")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"rows": [{"by_rank": [{"same": True}, {"copy_s": 1.0}]}], "direct_is_right": True}, False),
        ({"rows": [{"by_rank": [{"same": True}, {"same": False}]}]}, True),
        ({"rows": [], "direct_is_right": True, "staged_is_right": False}, True),
        ({"not_run": "it needs GPUs"}, True),
        ({"error": "OSError()"}, True),
        ({"variants": {"dwdp": {"reports": []}, "deepep": {"error": "cannot run"}}}, False),
        ({"variants": {"dwdp": {"error": "exit code 1"}}}, True),
    ],
)
def test_what_makes_the_script_fail(found: dict[str, Any], expected: bool) -> None:
    assert multi_gpu.trouble(found) is expected
