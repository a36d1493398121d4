"""The engine's process and its parent, with a fake `sglang` in a real process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.cases import decode_rate
from benchmarks.engine import REPORT, EngineProcess, Request
from benchmarks.processes import RunError, with_repository

SGLANG = '''
import asyncio

class Engine:
    """Answers with the prompt's length and the rank; prompts of 13 tokens end the process."""

    def __init__(self, **options):
        if options.get("broken"):
            raise ValueError("no such option")
        self.loop = asyncio.new_event_loop()
        self.order = []

    async def async_generate(self, input_ids, sampling_params, routed_dp_rank=None, stream=False, **more):
        self.order.append(routed_dp_rank)
        if len(input_ids) == 13:
            print("RuntimeError: unlucky", flush=True)
            import os; os._exit(3)
        if stream:
            return self.stream(sampling_params["max_new_tokens"])
        meta = {"output_token_logprobs": [(-0.5, 7, None)], "output_top_logprobs": [[(-0.5, 7, None), (-1.5, 8, None)]]}
        return {"output_ids": [len(input_ids), routed_dp_rank], "meta_info": meta}

    async def stream(self, count):
        for number in range(count):
            await asyncio.sleep(0.01)
            yield {"meta_info": {"completion_tokens": number + 1}}

    def get_server_info(self):
        late = [{"dwdp": {"group": 1, "rank": 0}}, {"dwdp": {"group": 0, "rank": 1}}]
        return {"internal_states": [*late, {"dwdp": {"group": 0, "rank": 0}, "order": self.order}]}

    def shutdown(self):
        pass
'''


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "sglang.py").write_text(SGLANG)
    base = dict(os.environ)
    return base | {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), base.get("PYTHONPATH"))))}


@pytest.fixture
def engine(environment: dict[str, str], tmp_path: Path) -> Iterator[EngineProcess]:
    with closing(EngineProcess("fake", {}, environment, tmp_path)) as made:
        made.wait_ready(60)
        yield made


def test_prompts_reach_their_ranks_in_turn(engine: EngineProcess) -> None:
    assert engine.ask(Request("batch", {0: [[1], [1, 1]], 1: [[2]]}, 1)) > 0
    first, *others = engine.ask(REPORT)
    assert first == {"dwdp": {"group": 0, "rank": 0}, "order": [0, 1, 0]}
    assert others == [{"dwdp": {"group": 0, "rank": 1}}, {"dwdp": {"group": 1, "rank": 0}}]
    answers = engine.ask(Request("answers", {0: [[1, 1]], 1: [[1]]}, 1))
    assert answers == {0: [([2, 0], [-0.5], [[-0.5, -1.5]], None)], 1: [([1, 1], [-0.5], [[-0.5, -1.5]], None)]}
    timelines = engine.ask(Request("stream", {0: [[1]], 1: [[1]]}, 20))
    assert [count for _, count in timelines[0]] == list(range(1, 21))
    assert 20 < decode_rate(timelines) < 2 / 0.01


def test_what_ends_an_engine_is_said(engine: EngineProcess) -> None:
    with pytest.raises(RunError, match="fake ended: RuntimeError: unlucky"):
        engine.ask(Request("batch", {0: [[1] * 13]}, 1))
    with pytest.raises(RunError, match=r"fake (has )?ended"):
        engine.ask(REPORT)


def test_an_engine_that_does_not_start(environment: dict[str, str], tmp_path: Path) -> None:
    engine = EngineProcess("bad", {"broken": True}, environment, tmp_path)
    with closing(engine), pytest.raises(RunError, match="bad ended: ValueError: no such option"):
        engine.wait_ready(60)


def test_an_engine_that_is_late(environment: dict[str, str], tmp_path: Path) -> None:
    engine = EngineProcess("late", {}, environment, tmp_path)
    with closing(engine), pytest.raises(RunError, match="late was not ready within 0 s"):
        engine.wait_ready(0)
    assert engine.process.exit_code() is not None


def test_this_repository_comes_first() -> None:
    assert with_repository({"PYTHONPATH": "/x"})["PYTHONPATH"].endswith(":/x")
