"""What a later step of SGLang's resolution changes is refused, by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches.final_check import refuse_changes
from sglang_dwdp.srt_patches.resolved import RESOLVED


def test_what_dwdp_settled_is_let_through() -> None:
    refuse_changes(SimpleNamespace(**RESOLVED))


def test_changes_are_named() -> None:
    with pytest.raises(DwdpConfigError, match="ep_size 2 in place of 1, moe_a2a_backend 'deepep' in place of 'none'"):
        refuse_changes(SimpleNamespace(**{**RESOLVED, "ep_size": 2, "moe_a2a_backend": "deepep"}))
