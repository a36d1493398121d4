"""Layers that SGLang shards over the ranks are not sharded with DWDP."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_dwdp.srt_patches.linear import unsharded_group, unsharded_head


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
