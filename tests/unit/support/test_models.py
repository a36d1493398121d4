"""Which models are validated, warned of and unsupported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.models import (
    EXPERT_COUNT_KEYS,
    EXPERTS_PER_TOKEN_KEYS,
    UNSUPPORTED,
    UNVALIDATED,
    VALIDATED,
    VALIDATED_ON_CPU,
    WITHOUT_DP_ATTENTION,
    changed_sizes,
    check,
    expert_count,
    experts_per_token,
)
from tests.fixtures.architectures import WITHOUT_EXPERTS, architectures_with_experts
from tests.fixtures.families import Shape, config
from tests.gpu.cases import ALL


def test_what_tests_compare_is_what_is_called_validated() -> None:
    served = [config(case.family, Shape())["architectures"] for case in ALL]
    assert {name for names in served for name in names} == VALIDATED
    for name in VALIDATED:
        assert check([name]) is None


def test_others_are_warned_of_once() -> None:
    for names, known in (
        (UNVALIDATED, ""),
        (VALIDATED_ON_CPU, " on GPUs, only on the CPU engine"),
        ({"SomeMoeForCausalLM"}, ", and is not among the models that DWDP knows"),
    ):
        for name in names:
            warning = check([name])
            assert warning is not None
            assert warning.startswith(f"{name} has not been validated against a single rank{known} (docs/models.md)")
    assert check(None) is None


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_errors_with_a_reason(name: str) -> None:
    with pytest.raises(DwdpConfigError, match=rf"{name} is unsupported: .{{40,}} Serve it without --enable-dwdp.$"):
        check([name])


def test_every_model_with_routed_experts_is_in_one_class() -> None:
    """By SGLang's own code: a model that a new release brings, or gives experts, has to be looked at."""
    found = architectures_with_experts()
    assert {"Qwen3MoeForCausalLM", "KimiVLForConditionalGeneration", "DbrxForCausalLM"} <= found
    classes = (VALIDATED, VALIDATED_ON_CPU, UNVALIDATED, frozenset(UNSUPPORTED), WITHOUT_EXPERTS)
    counted = Counter(name for names in classes for name in names)
    assert {name: counted[name] for name in found if counted[name] != 1} == {}
    assert set(counted) - found == set()
    assert WITHOUT_DP_ATTENTION <= VALIDATED | VALIDATED_ON_CPU | UNVALIDATED


@pytest.mark.parametrize(
    ("keys", "read"), [(EXPERT_COUNT_KEYS, expert_count), (EXPERTS_PER_TOKEN_KEYS, experts_per_token)]
)
def test_numbers_of_experts_are_read_under_every_name(keys: tuple[str, ...], read: Callable[[Any], int | None]) -> None:
    for key in keys:
        assert read(SimpleNamespace(**{key: 8})) == 8
        assert read(SimpleNamespace(**{key: [8, 4]})) == 8  # by layer, as Hunyuan has them
    assert read(SimpleNamespace(**{keys[0]: None, keys[-1]: 8})) == 8
    assert read(SimpleNamespace(**{keys[0]: 0})) is None
    assert read(SimpleNamespace()) is None


def test_every_validated_model_says_how_many_experts_a_token_chooses() -> None:
    for case in ALL:
        described = config(case.family, Shape())
        text = SimpleNamespace(**described.get("text_config", described))
        assert expert_count(text) is not None, case.family
        assert experts_per_token(text) is not None, case.family


def test_checkpoints_of_other_sizes_are_told_apart() -> None:
    old = {"hidden_size": 8, "num_experts": 4, "bos_token_id": 1, "text_config": {"head_dim": 2}}
    assert changed_sizes(old, old) == []
    assert changed_sizes(old, {}) == []
    assert changed_sizes(old, old | {"bos_token_id": 2}) == []
    new = old | {"num_experts": 5, "text_config": {"head_dim": 3}}
    assert changed_sizes(old, new) == ["num_experts 4 and 5", "head_dim 2 and 3"]
