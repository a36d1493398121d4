"""Texts that a grammar, a regular expression or a JSON schema constrains."""

from __future__ import annotations

import openai
import pytest
from sglang.test.kits.ebnf_constrained_kit import EBNFConstrainedMixin
from sglang.test.kits.json_constrained_kit import JSONConstrainedMixin
from sglang.test.kits.json_mode_kit import JSONModeMixin
from sglang.test.kits.regex_constrained_kit import RegexConstrainedMixin

from tests.kits.server import DwdpServer

pytestmark = pytest.mark.kits


class TestGrammars(EBNFConstrainedMixin, RegexConstrainedMixin, JSONConstrainedMixin, JSONModeMixin, DwdpServer):
    """With a model that ends."""

    ends = True
    test_ebnf_generate_complex_json = None  # wants certain keys, which its grammar leaves open

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.client = openai.Client(api_key="EMPTY", base_url=f"{cls.base_url}/v1")
