"""Layers that SGLang shards over the ranks are not sharded with DWDP."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dwdp.srt_patches import linear
from sglang_dwdp.srt_patches.linear import unsharded_group, unsharded_head, unsharded_model


def test_only_attentions_group_is_left_to_shard_over() -> None:
    assert unsharded_group(lambda group: f"the group of {group}", "attn_tp") == "the group of attn_tp"
    assert [unsharded_group(lambda group: group, name) for name in ("tp", "moe_tp", None)] == [None] * 3


@pytest.mark.parametrize("given", [{}, {"use_attn_tp_group": False}, {"enable_tp": True}])
def test_heads_are_sharded_over_attentions_group_at_most(given: dict[str, Any]) -> None:
    made: list[Any] = []
    unsharded_head(lambda *args, **kwargs: made.append((args, kwargs)), "head", 2048, 64, prefix="lm_head", **given)
    assert made == [(("head", 2048, 64), {"prefix": "lm_head", **given, "use_attn_tp_group": True})]


def test_heads_of_no_group_stay_as_they_are() -> None:
    made: list[Any] = []
    unsharded_head(lambda *_args, **kwargs: made.append(kwargs), "head", 2048, 64, enable_tp=False)
    assert made == [{"enable_tp": False, "use_attn_tp_group": False}]


@pytest.mark.parametrize(
    ("architectures", "draft", "alone"),
    [
        (["MixtralForCausalLM"], False, True),
        (["Qwen3MoeForCausalLM"], False, False),
        (["LlamaForCausalLMEagle"], True, True),
    ],
)
def test_models_without_data_parallel_attention_find_one_rank(
    monkeypatch: pytest.MonkeyPatch, architectures: list[str], draft: bool, alone: bool
) -> None:
    seen: list[dict[str, Any]] = []

    @contextmanager
    def override(**values: Any) -> Any:
        seen.append(values)
        yield

    monkeypatch.setattr(linear, "get_parallel", lambda: SimpleNamespace(override=override, attn_tp_group="own"))
    with unsharded_model(architectures, is_dense_draft=draft), unsharded_model(None):
        assert len(seen) == alone
    for values in seen:
        assert values["tp_group"] == "own"
        assert {name: value for name, value in values.items() if name.endswith(("tp_size", "dp_size"))} == {
            "tp_size": 1,
            "attn_tp_size": 1,
            "attn_dp_size": 1,
            "moe_dp_size": 1,
            "moe_tp_size": 1,
        }
        assert {value for name, value in values.items() if name.endswith("rank")} == {0}


class HunYuanAttention(torch.nn.Module):
    """What of SGLang's is used, with two heads of 4 values."""

    def __init__(self, *, use_qk_norm: bool) -> None:
        super().__init__()
        self.use_qk_norm, self.q_size = use_qk_norm, 8
        self.query_layernorm = torch.nn.RMSNorm(4)


@pytest.mark.parametrize(("use_qk_norm", "rows"), [(True, (3, 8)), (False, (6, 4))])
def test_hunyuans_queries_keep_a_row_for_each_token(use_qk_norm: bool, rows: tuple[int, int]) -> None:
    attention = HunYuanAttention(use_qk_norm=use_qk_norm)
    linear.keep_rows_of_tokens(torch.nn.Sequential(attention))
    assert attention.query_layernorm(torch.zeros(6, 4)).shape == rows
