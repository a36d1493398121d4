"""Which models are served, warned of and refused."""

from __future__ import annotations

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.models import COMPARED, REFUSED, check
from tests.fixtures.families import Shape, config
from tests.gpu.cases import ALL


def test_what_tests_compare_is_what_is_called_compared() -> None:
    served = [config(case.family, Shape())["architectures"] for case in ALL]
    assert {name for names in served for name in names} == COMPARED
    for name in COMPARED:
        assert check([name]) is None


def test_others_are_warned_of_once() -> None:
    warning = check(["SomeMoeForCausalLM"])
    assert warning is not None
    assert warning.startswith("SomeMoeForCausalLM has not been compared with a single rank")
    assert check(None) is None


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_layers_sum_over_ranks_are_refused(name: str) -> None:
    with pytest.raises(DwdpConfigError, match=rf"{name}: .*sums routed and shared experts.*without --enable-dwdp"):
        check([name])
