"""Which models are served, warned of and unsupported."""

from __future__ import annotations

import pytest

from sglang_dwdp.demo.families import Shape, config
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.models import UNSUPPORTED, VALIDATED, check
from tests.gpu.cases import ALL


def test_what_tests_compare_is_what_is_called_validated() -> None:
    served = [config(case.family, Shape(), "bfloat16", 64)["architectures"] for case in ALL]
    assert {name for names in served for name in names} == VALIDATED
    for name in VALIDATED:
        assert check([name]) is None


def test_others_are_warned_of_once() -> None:
    warning = check(["SomeMoeForCausalLM"])
    assert warning is not None
    assert warning.startswith("SomeMoeForCausalLM has not been validated against a single rank")
    assert check(None) is None


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_whose_forwards_have_collectives_are_unsupported(name: str) -> None:
    with pytest.raises(
        DwdpConfigError, match=rf"{name}: .*(sums|gathers).* a rank's forward would wait.*without --enable-dwdp"
    ):
        check([name])
