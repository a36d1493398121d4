"""Which of SGLang's arguments DWDP resolves, and to what, for every model and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESOLVED: Mapping[str, Any] = {
    # Every rank runs all experts of its tokens, so no rank is one of several in data or expert parallelism. Which
    # experts it stores is decided by experts.py.
    "dp_size": 1,
    "ep_size": 1,
    "moe_dp_size": 1,
    "moe_a2a_backend": "none",
    "moe_dense_tp_size": 1,
    "enable_dp_lm_head": True,
    "enable_dp_attention_local_control_broadcast": True,
    # A fused shared expert is one more row of the expert tensors, replicated on every rank.
    "disable_shared_experts_fusion": True,
    "enforce_shared_experts_fusion": False,
}
"""With other values ranks would wait for each other, or read the wrong experts, so the values are checked again once
SGLang has resolved all arguments (`final_check`)."""
