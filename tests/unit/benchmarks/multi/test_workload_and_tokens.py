"""Part c without servers: what is sent, to whom, how engines are asked for, and what is made of their answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.engines import Answer
from benchmarks.multi import tokens, variants
from benchmarks.multi.workload import CPU_LOAD, GPU_LOAD, Draws, Prefill
from sglang_dwdp.config import option_names


def test_lengths_are_drawn_once_and_fit_the_chunk() -> None:
    varied = Prefill(16384, 0.2, 50)
    lengths = varied.drawn(4)
    assert lengths == varied.drawn(4)
    flat = [length for mine in lengths for length in mine]
    assert all(16384 * 0.8 - 1 <= length <= 16384 for length in flat)
    assert len(set(flat)) > 100
    assert len({sum(mine) for mine in lengths}) == 4  # ranks get different numbers of tokens
    assert sum(flat) / len(flat) == pytest.approx(0.9 * 16384, rel=0.02)
    assert Prefill(4096, 0.0, 3).drawn(2) == [[4096] * 3] * 2
    assert Prefill(4096, 0.2, 3).drawn(2) != Prefill(8192, 0.2, 3).drawn(2)


def test_the_load_is_what_the_comparison_is_for() -> None:
    assert sorted({prefill.length for prefill in GPU_LOAD.prefills}) == [1024, 4096, 8192, 16384]
    assert {prefill.variation for prefill in GPU_LOAD.prefills} == {0.0, 0.2}
    assert len(GPU_LOAD.prefills) == 8
    assert GPU_LOAD.decodes == (1, 8, 32)
    for load in (GPU_LOAD, CPU_LOAD):
        assert max(prefill.length for prefill in load.prefills) <= load.chunk
        assert max(load.compared) + load.compared_tokens <= load.cached_tokens


def test_every_rank_gets_prompts_of_its_own() -> None:
    draws = Draws()
    given = draws.for_ranks([[3, 5], [4, 4]])
    assert {rank: [len(prompt) for prompt in prompts] for rank, prompts in given.items()} == {0: [3, 5], 1: [4, 4]}
    assert draws.prompt(20) != draws.prompt(20)
    assert Draws().for_ranks([[9]]) == Draws().for_ranks([[9]])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_all_variants_get_the_same_chunk_and_room_on_a_rank(ranks: int) -> None:
    per_rank = set()
    for name in variants.VARIANTS:
        options = variants.engine_options(name, ranks, GPU_LOAD, "M", cpu=False, attention="triton")
        # SGLang divides both by the ranks of attention data parallelism; this plugin keeps the chunk.
        divides_chunk = ranks if name in ("in-tree", "dep", "deepep", "deepep-normal") else 1
        divides_requests = options["tp_size"]
        per_rank.add(
            (
                options["chunked_prefill_size"] // divides_chunk,
                options["max_running_requests"] // divides_requests,
                options["max_total_tokens"],
                options["max_prefill_tokens"],
                options["prefill_max_requests"],
            )
        )
        assert options["tp_size"] * options.get("dp_size", 1) == ranks
    assert per_rank == {(16384, 64, GPU_LOAD.cached_tokens, 16384, 1)}


def test_sglang_knows_every_argument() -> None:
    """Names, not values: those that SGLang's own resolution checks are checked when engines start."""
    from sglang.srt.server_args import ServerArgs

    known = set(ServerArgs.__struct_fields__) | set(option_names())
    for name in variants.VARIANTS:
        for cpu in (False, True):
            options = variants.engine_options(name, 2, CPU_LOAD, "M", cpu=cpu, attention="triton")
            assert options.keys() <= known, options.keys() - known


def test_what_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert variants.why_not("in-tree", 3, 0) == "it needs GPUs"
    assert variants.why_not("dwdp", 3, 0) is None
    assert "4 ranks need 4 GPUs" in (variants.why_not("dep", 4, 2) or "")
    assert variants.why_not("dep", 4, 1) is None  # they share it
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "deep_ep is not installed" in (variants.why_not("deepep", 2, 2) or "")
    monkeypatch.undo()
    several = variants.environment("dep", 2, 2, tmp_path, os.environ)
    assert several["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    assert "SGLANG_NCCL_SO_PATH" not in several  # NCCL between GPUs; not where ranks share one
    assert "SGLANG_NCCL_SO_PATH" in variants.environment("dep", 2, 1, tmp_path, os.environ)
    assert "NVSHMEM_REMOTE_TRANSPORT" not in several
    assert variants.environment("deepep", 2, 2, tmp_path, {})["NVSHMEM_REMOTE_TRANSPORT"] == "none"
    assert variants.environment("replicas", 2, 0, tmp_path, {})["SGLANG_USE_CPU_ENGINE"] == "1"


def answer(ids: list[int], scores: list[float], second: list[tuple[float, int]]) -> Answer:
    top = [[(score, token), other] for token, score, other in zip(ids, scores, second, strict=True)]
    return Answer(ids, scores, top)


EXPECTED = answer([5, 6, 7], [-0.5, -0.25, -1.0], [(-3.0, 1), (-0.26, 2), (-4.0, 3)])


def test_equal_answers() -> None:
    near = answer([5, 6, 7], [-0.5, -0.26, -1.0], [(-3.0, 1), (-0.27, 2), (-4.0, 3)])
    found = tokens.compare({0: [EXPECTED], 1: [near]}, [EXPECTED])
    assert (found["answers"], found["same_tokens"], found["same_logprobs"]) == (2, 2, 1)
    assert found["largest_difference"] == pytest.approx(0.01)
    assert found["ties"] == 0
    assert tokens.share_same({"a": found}) == 1.0
    assert tokens.share_same({}) is None


def test_a_difference_is_a_tie_only_if_rounding_can_explain_it() -> None:
    near = answer([5, 6, 7], [-0.51, -0.25, -1.0], [(-3.0, 1), (-0.26, 2), (-4.0, 3)])
    # Its second token is the reference's second best, 0.01 below; differences of 0.01 were seen.
    tie = answer([5, 2, 9], [-0.5, -0.25, -1.0], [(-3.0, 1), (-0.26, 6), (-4.0, 3)])
    # Its third token is one that the reference did not think of; its first one was 2.5 below.
    unknown = answer([5, 6, 8], [-0.5, -0.25, -1.0], [(-3.0, 1), (-0.26, 2), (-4.0, 3)])
    far = answer([1, 6, 7], [-0.5, -0.25, -1.0], [(-3.0, 5), (-0.26, 2), (-4.0, 3)])
    found = tokens.compare({0: [near, tie], 1: [unknown, far]}, [EXPECTED, EXPECTED])
    assert found["same_tokens"] == 1
    assert found["ties"] == 1
    assert [each["position"] for each in found["first_differences"]] == [1, 2, 0]
    assert [each["gap"] for each in found["first_differences"]] == [pytest.approx(0.01), None, pytest.approx(2.5)]
    # Where nothing else differs, nothing explains it.
    alone = tokens.compare({0: [tie]}, [EXPECTED])
    assert alone["ties"] == 0
    assert tokens.share_same({"a": found, "b": {"answers": 4, "same_tokens": 4}}) == 0.25
