"""Cases of the engines' driver: names, lengths, graphs' sizes, rates, answers."""

from __future__ import annotations

import pytest

from benchmarks.cases import (
    Case,
    Draws,
    decode_rate,
    graph_size,
    graph_sizes,
    parity_prompts,
    parse_case,
    same_answers,
)


@pytest.mark.parametrize("text", ["prefill:4096", "prefill:4096:20", "decode:8", "decode:8:1"])
def test_names_survive_parsing(text: str) -> None:
    assert parse_case(text).name == text


@pytest.mark.parametrize(
    "text", ["prefill", "prefill:0", "prefill:x", "prefill:8:100", "decode:8:0", "decode:", "decode:8:1:1", "x:1"]
)
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(ValueError, match="is no case"):
        parse_case(text)


def test_lengths_vary_on_both_sides_and_are_the_same_at_every_call() -> None:
    case = parse_case("prefill:1000:20")
    (first, second) = case.lengths(2, 200)
    assert case.lengths(2, 200) == [first, second]
    assert first != second
    assert 800 <= min(first) < 850
    assert 1150 < max(first) <= case.longest == 1200
    assert parse_case("prefill:7").lengths(2, 3) == [[7] * 3] * 2
    assert parse_case("decode:3").lengths(2, 32) == [[128] * 3] * 2
    assert parse_case("decode:3:1").lengths(2, 32) == [[128] * 3, []]


def test_prompts_are_never_the_same_twice() -> None:
    draws = Draws()
    prompts = draws.by_rank([[40, 40], [40]])
    assert {rank: [len(prompt) for prompt in own] for rank, own in prompts.items()} == {0: [40, 40], 1: [40]}
    assert len({tuple(prompt) for own in prompts.values() for prompt in own}) == 3
    found = parity_prompts(16384)
    assert found == parity_prompts(16384)
    assert [len(found[0]), len(found[-1]), len(found)] == [1, 16384, 64]


def test_graph_sizes_are_those_of_sglang() -> None:
    hook = pytest.importorskip("sglang.srt.arg_groups.cuda_graph_hook")
    sizes = hook.generate_prefill_cuda_graph_batch_sizes(16384)
    for tokens in range(1, 16385):
        assert graph_size(tokens) == next(size for size in sizes if size >= tokens)
    assert graph_sizes([Case("prefill", 4096), Case("prefill", 100), Case("decode", 8)], 2, 4) == [112, 128, 4096]


def test_decode_rate_is_of_the_time_in_which_all_decode() -> None:
    early = [(0.0, 1), (1.0, 2), (2.0, 3), (3.0, 4)]
    late = [(1.0, 1), (2.0, 2), (3.0, 3), (4.0, 4)]
    assert decode_rate([early, late]) == pytest.approx(2.0)  # from 1 to 3 s, two tokens each
    with pytest.raises(ValueError, match="never decoded together"):
        decode_rate([early, [(3.0, 1), (4.0, 2)]])


def test_answers_that_differ_in_a_token_or_in_a_bit() -> None:
    right = [([1, 2], [-0.5, -0.25], []), ([3], [-1.0], [])]
    other_bit = [([1, 2], [-0.5, -0.25000001], []), ([3], [-1.0], [])]
    other_token = [([1, 9], [-0.5, -0.25], []), ([3], [-1.0], [])]
    assert same_answers({0: right, 1: right}, right) == {"answers": 4, "same_tokens": 4, "bitwise": 4}
    assert same_answers({0: right, 1: other_bit}, right) == {"answers": 4, "same_tokens": 4, "bitwise": 3}
    assert same_answers({0: other_token}, right) == {"answers": 2, "same_tokens": 1, "bitwise": 1}
