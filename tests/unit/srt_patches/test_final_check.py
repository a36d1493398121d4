"""What a later step of SGLang's resolution changes is an error, by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches.final_check import PREFERENCES, check_resolved, declared_by
from tests.unit.support.test_conflicts import PLAIN

DECLARED = {"dwdp_size": 2, "ep_size": 1, "moe_a2a_backend": "none", "disable_cuda_graph": True}


def view(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**PLAIN | DECLARED | changes)


def test_what_dwdp_decided_is_let_through() -> None:
    check_resolved(view(tp_size=4), DECLARED)


def test_changes_are_named() -> None:
    with pytest.raises(DwdpConfigError, match="ep_size 2 in place of 1, moe_a2a_backend 'deepep' in place of 'none'"):
        check_resolved(view(ep_size=2, moe_a2a_backend="deepep"), DECLARED)


@pytest.mark.parametrize("name", DECLARED)
def test_every_declared_value_is_compared(name: str) -> None:
    with pytest.raises(DwdpConfigError, match=f"{name} 'another' in place of"):
        check_resolved(view(**{name: "another"}), DECLARED)


@pytest.mark.parametrize("name", sorted(PREFERENCES))
def test_preferences_may_change(name: str) -> None:
    check_resolved(view(**{name: "another"}), DECLARED | {name: "this"})


def test_conflicts_that_a_later_step_makes_are_errors() -> None:
    with pytest.raises(DwdpConfigError, match="--load-format remote"):
        check_resolved(view(load_format="remote"), DECLARED)
    with pytest.raises(DwdpConfigError, match="two-batch"):
        check_resolved(view(enable_two_batch_overlap=True), DECLARED)


def test_the_last_declaration_of_a_source_counts() -> None:
    args = SimpleNamespace(_resolved_overrides=[("a", {"x": 1}), ("b", {"x": 2, "y": 3}), ("a", {"x": 4, "z": 5})])
    assert declared_by(args, "a") == {"x": 4, "z": 5}
