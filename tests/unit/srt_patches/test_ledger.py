"""The ledger names every hook, and its hashes are those of the installed SGLang."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from sglang_dwdp.srt_patches import (
    arguments,
    controller,
    exchange,
    experts,
    first_forward,
    flashinfer_fp8,
    forward,
    install,
    linear,
    loading,
    lost_rank,
    metrics,
    ports,
    prefill_graphs,
    recorder,
    reports,
    sessions,
    steps,
    weights,
)
from tests.fixtures.ledger import Entry, entries, source_hash

ENTRIES = entries()
HOOKS = (
    *install.HOOKS,
    *arguments.HOOKS,
    *controller.HOOKS,
    *flashinfer_fp8.HOOKS,
    *steps.HOOKS,
    *linear.HOOKS,
    *experts.HOOKS,
    *experts.AUDIT_HOOKS,
    *loading.HOOKS,
    *forward.HOOKS,
    *first_forward.HOOKS,
    *lost_rank.TOKENIZER_HOOKS,
    *metrics.HOOKS,
    *ports.HOOKS,
    *prefill_graphs.HOOKS,
    *exchange.HOOKS,
    *exchange.GPU_HOOKS,
    *reports.SCHEDULER_HOOKS,
    *reports.CONTROLLER_HOOKS,
    *weights.SCHEDULER_HOOKS,
    *weights.TOKENIZER_HOOKS,
    *sessions.CONTROLLER_HOOKS,
    *sessions.SCHEDULER_HOOKS,
    *recorder.SCHEDULER_HOOKS,
    *recorder.TOKENIZER_HOOKS,
)


def test_every_hook_has_a_row() -> None:
    assert {hook.target for hook in HOOKS} <= {entry.target for entry in ENTRIES}


def test_no_symbol_is_listed_twice() -> None:
    assert len({entry.target for entry in ENTRIES}) == len(ENTRIES) > len(HOOKS)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.target)
def test_the_source_is_a_verified_one(entry: Entry) -> None:
    release = version("sglang")
    assert release in entry.hashes, f"verify {entry.target} with SGLang {release} and add its hash to ledger.md"
    assert source_hash(entry.target) == entry.hashes[release]
