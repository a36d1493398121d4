"""--dwdp-exchange auto on real servers: decode forwards that ranks run together, and idle ranks that help."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import Reference, Running
from tests.e2e.prompts import MAX_NEW_TOKENS, PROMPTS
from tests.fixtures.families import Family


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_decode_together(
    running: Running, models: Callable[[Family, int], Path], reference: Reference, ranks: int
) -> None:
    """The tokens are those of one rank: in float32 no two best tokens of these prompts are close."""
    expected = reference("qwen3_moe", 8)
    with running(models("qwen3_moe", 8), ranks, dwdp=("--dwdp-exchange", "auto")) as server:

        def ask(number: int, rank: int) -> bool:
            return server.generate(PROMPTS[number], MAX_NEW_TOKENS, rank) == expected[number]

        # Different loads: rank 0 decodes three prompts at a time, the others one.
        numbers = [number for number in range(len(PROMPTS)) for _ in range(ranks + 2)]
        places = [place % (ranks + 2) for place in range(len(numbers))]
        with ThreadPoolExecutor(ranks + 2) as pool:
            assert all(pool.map(ask, numbers, [max(place - 2, 0) for place in places]))
        loaded = server.reports()
        assert all(report["joint_rounds"] > 0 for report in loaded)
        # The others are idle. One that looks too late for a step of rank 0's helps with another.
        for _ in range(10):
            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(ask, range(4), [0] * 4))
            idle = server.reports()[1:]
            if all(
                after["helped_rounds"] > before["helped_rounds"] for before, after in zip(loaded[1:], idle, strict=True)
            ):
                break
        else:
            raise AssertionError(f"no idle rank helped: {idle}")
        for before, after in zip(loaded[1:], idle, strict=True):
            assert after["joint_rounds"] == before["joint_rounds"]
            assert not after["joint_rounds_ended"]
