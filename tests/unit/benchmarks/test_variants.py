"""Variants of the engines' driver: what the command line says, and the keywords that engines get."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cases import parse_case
from benchmarks.variants import KINDS, Setting, Variant, engine_options, environment, parse_variants
from sglang_dwdp.config import option_names

# Whatever departs from SGLang's defaults for how a forward runs would make the comparison another one.
FORBIDDEN = {
    "attention_backend",
    "moe_runner_backend",
    "disable_custom_all_reduce",
    "disable_cuda_graph",
    "cuda_graph_backend_prefill",
    "disable_overlap_schedule",
    "enable_dp_lm_head",
    "moe_dense_tp_size",
}


def setting(*cases: str, devices: int = 2) -> Setting:
    return Setting(2, devices, "model", True, [parse_case(case) for case in cases], prompts=32, decode_tokens=256)


def options(kind: str, *cases: str) -> dict[str, object]:
    return engine_options(Variant(kind, kind), setting(*cases))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_turned_off(kind: str) -> None:
    found = options(kind, "prefill:16384:20", "decode:32")
    assert not FORBIDDEN & set(found)
    assert found["prefill_max_requests"] == 1
    assert found["load_format"] == "dummy"


def test_the_chunk_is_the_default_until_a_prompt_is_as_long() -> None:
    """SGLang's is 8,192 on these GPUs, which it divides by the ranks of attention data parallelism."""
    assert "chunked_prefill_size" not in options("dwdp", "prefill:8000")
    assert "chunked_prefill_size" not in options("dep", "prefill:4000")
    assert options("dwdp", "prefill:8192")["chunked_prefill_size"] == 8704
    assert options("dep", "prefill:8192")["chunked_prefill_size"] == 2 * 8704
    assert options("in-tree", "prefill:8192")["chunked_prefill_size"] == 2 * 8704
    assert options("dwdp", "prefill:16384")["chunked_prefill_size"] == 16896
    varied = options("replicas", "prefill:16384:20")
    assert varied["chunked_prefill_size"] == varied["max_prefill_tokens"] == 19968


def test_graphs_and_cache_are_what_cases_use() -> None:
    found = options("dwdp", "prefill:500", "decode:8")
    assert found["cuda_graph_bs_prefill"] == [128, 512]
    assert found["cuda_graph_bs_decode"] == [1, 8]
    assert found["max_total_tokens"] == 8 * (128 + 256 + 64) + 2048
    together = options("tp", "prefill:500", "decode:8")  # one batch and one cache for all ranks' requests
    assert together["cuda_graph_bs_decode"] == [1, 16]
    assert together["max_total_tokens"] == 2 * (8 * (128 + 256 + 64) + 2048)
    chosen = replace(setting("prefill:500"), buckets=[2048, 512])
    assert engine_options(Variant("dep", "dep"), chosen)["cuda_graph_bs_prefill"] == [512, 2048]


def test_what_cannot_run() -> None:
    with pytest.raises(ValueError, match="needs GPUs"):
        engine_options(Variant("dep", "dep"), setting("prefill:8", devices=0))
    with pytest.raises(ValueError, match="4 ranks need 4 GPUs"):
        engine_options(Variant("dwdp", "dwdp"), replace(setting("prefill:8"), ranks=4))


def test_names_kinds_and_settings() -> None:
    found = parse_variants(
        ["dep", "staged=dwdp"],
        [["staged", "dwdp-view=staged", "SGLANG_X=1"], ["all", "page_size=16", "dwdp_view=direct"]],
    )
    assert found == [
        Variant("dep", "dep", {"page_size": 16, "dwdp_view": "direct"}),
        Variant("staged", "dwdp", {"page_size": 16, "dwdp_view": "staged"}, {"SGLANG_X": "1"}),
    ]


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["x"], [], "'x' is none of"),
        (["dep"], [["tp", "a=1"]], "--set tp: the variants are dep"),
        (["dep"], [["dep", "a"]], "has to be KEY=VALUE"),
    ],
)
def test_bad_words(names: list[str], settings: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variants(names, settings)


def test_variables(tmp_path: Path) -> None:
    def of(kind: str, devices: int) -> dict[str, str]:
        base = {"PATH": "/bin"}
        return environment(kind, ranks=2, devices=devices, several=True, made=False, folder=tmp_path, base=base)

    assert of("dep", 2)["PATH"] == "/bin"
    assert str(tmp_path / "one_gpu") in of("dwdp", 1)["PYTHONPATH"]
    assert "SGLANG_USE_CPU_ENGINE" in of("dwdp", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_sglang_has_all_keywords(kind: str) -> None:
    server_args = pytest.importorskip("sglang.srt.server_args").ServerArgs
    known = {*server_args.__struct_fields__, *option_names()}
    assert set(options(kind, "prefill:16384:20", "decode:32")) <= known
