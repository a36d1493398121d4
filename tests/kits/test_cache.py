"""Prefixes and retractions, over staged experts and large pages."""

from __future__ import annotations

from typing import ClassVar

import pytest
from sglang.test.kits import radix_cache_server_kit as radix
from sglang.test.kits.kl_divergence_kit import KLDivergenceMixin

from tests.kits.server import DwdpServer, use_own_prompts

pytestmark = pytest.mark.kits
use_own_prompts()
radix.gen_radix_tree.__defaults__ = (60, 48)  # nodes, and tokens of each


class TestCache(KLDivergenceMixin, DwdpServer):
    """A server that takes work back again and again."""

    flags: ClassVar[tuple[str, ...]] = (
        *("--dwdp-view", "staged", "--page-size", "16", "--enable-mixed-chunk", "--chunked-prefill-size", "128"),
        *("--max-total-tokens", "8192"),
    )
    server_env: ClassVar[dict[str, str]] = {"SGLANG_TEST_RETRACT": "1"}
    kl_div_thres = 1e-6
    kl_div_max_samples = 12
    kl_div_prefill_max_new_tokens = kl_div_decode_max_new_tokens = 24

    def test_radix_attention(self) -> None:
        radix.run_radix_attention_test(self.base_url)
        assert self.process.poll() is None
