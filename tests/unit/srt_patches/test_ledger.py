"""The ledger names every hook, and its hashes are those of the installed SGLang."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches import (
    arguments,
    controller,
    exchange,
    exchange_graphs,
    exchange_results,
    experts,
    first_forward,
    flashinfer_fp8,
    forward,
    hosts,
    install,
    linear,
    load_lock,
    loading,
    lost_rank,
    metrics,
    ports,
    prefill_graphs,
    rank_traffic,
    rank_watch,
    recorder,
    reports,
    sessions,
    steps,
    update_hooks,
    weights,
)
from sglang_dwdp.support.ledger import Entry, entries, source_hash

ENTRIES = entries()
HOOKS = (
    *install.HOOKS,
    *arguments.HOOKS,
    *controller.HOOKS,
    *flashinfer_fp8.HOOKS,
    *steps.HOOKS,
    *steps.GPU_HOOKS,
    *linear.HOOKS,
    *experts.HOOKS,
    *experts.AUDIT_HOOKS,
    *loading.HOOKS,
    *forward.HOOKS,
    *first_forward.HOOKS,
    *load_lock.HOOKS,
    *hosts.HOOKS,
    *lost_rank.TOKENIZER_HOOKS,
    *lost_rank.OUTLIVED_HOOKS,
    *rank_traffic.HOOKS,
    *rank_watch.HOOKS,
    *metrics.HOOKS,
    *ports.HOOKS,
    *prefill_graphs.HOOKS,
    *exchange.HOOKS,
    *exchange_graphs.HOOKS,
    *exchange_results.HOOKS,
    *reports.SCHEDULER_HOOKS,
    *reports.CONTROLLER_HOOKS,
    *update_hooks.HOOKS,
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


def test_every_hook_is_that_of_some_process() -> None:
    """Those at plugin load are put in place by plugin.py."""
    config = DwdpConfig(exchange="auto", audit=True)
    roles = ("scheduler", "dp_controller", "tokenizer")
    installed = {hook.target for role in roles for hook in install._hooks(role, config, "cuda")}
    assert installed | {hook.target for hook in (*install.HOOKS, *arguments.HOOKS)} == {hook.target for hook in HOOKS}
    assert not install._hooks("detokenizer", config, "cuda")


@pytest.mark.parametrize("role", ["scheduler", "dp_controller", "tokenizer"])
def test_a_process_checks_sources_before_it_hooks_the_first(
    role: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(targets: set[str]) -> None:
        raise DwdpConfigError(f"{len(targets)} differ")

    monkeypatch.setattr(install, "config_of", lambda _args: DwdpConfig())
    monkeypatch.setattr(install, "resolving_view", lambda _args: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(install, "check_sources", differ)
    monkeypatch.setattr(install, "install", lambda _hooks: pytest.fail("it hooks nonetheless"))
    with pytest.raises(DwdpConfigError):
        install.install_for_role(None, None, role=role)
    count = len({hook.target for hook in install._hooks(role, DwdpConfig(), "cpu")})
    assert capsys.readouterr().err == f"sglang-dwdp: error: {count} differ\n"
