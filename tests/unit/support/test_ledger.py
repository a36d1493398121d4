"""A server hooks sources that it was verified with, and a patched build of the same release is named."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support import ledger, release
from sglang_dwdp.support.ledger import Entry, check_sources

HOOKED, CALLED, ELSEWHERE = "json.dumps", "json.decoder.JSONDecoder.decode", "xdrlib_of_none.function"


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger of three functions; the module of the last one is not there."""

    def entry(target: str, is_hooked: bool) -> Entry:
        digest = "0" * 12 if target == ELSEWHERE else ledger.source_hash(target)
        return Entry(target, {release.SGLANG: digest}, is_hooked)

    rows = [entry(HOOKED, True), entry(CALLED, False), entry(ELSEWHERE, False)]
    monkeypatch.setattr(ledger, "entries", lambda: rows)
    monkeypatch.delenv(ledger.ALLOW_PATCHED, raising=False)
    monkeypatch.delenv(release.OVERRIDE, raising=False)


def patched(value: object) -> str:
    """In the place of json.dumps."""
    return str(value)


@pytest.mark.usefixtures("verified")
def test_what_is_not_loaded_or_not_hooked_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sources({HOOKED})
    monkeypatch.setattr(json, "dumps", patched)
    check_sources(())
    monkeypatch.setitem(sys.modules, "xdrlib_of_none", ModuleType("xdrlib_of_none"))
    with pytest.raises(DwdpConfigError, match=ELSEWHERE):  # loaded, and lacks the function
        check_sources(())


@pytest.mark.usefixtures("verified")
def test_a_patched_function_is_named_unless_the_user_insists(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(json, "dumps", patched)
    monkeypatch.setattr(json.decoder.JSONDecoder, "decode", patched)
    with pytest.raises(
        DwdpConfigError, match=f"{HOOKED}, {CALLED} in this SGLang is not.*{ledger.ALLOW_PATCHED}=1"
    ) as error:
        check_sources({HOOKED})
    assert "\n" not in str(error.value)
    monkeypatch.setenv(ledger.ALLOW_PATCHED, "1")
    with caplog.at_level(logging.WARNING):
        check_sources({HOOKED})
    assert HOOKED in caplog.text


@pytest.mark.usefixtures("verified")
def test_nothing_is_checked_where_any_release_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", patched)
    monkeypatch.setenv(release.OVERRIDE, "1")
    check_sources({HOOKED})


def test_all_rows_take_less_than_a_third_of_a_second() -> None:
    rows = ledger.entries()
    assert len(rows) > 70
    assert ledger.changed(rows) == []  # also imports what is not there yet
    started = time.perf_counter()
    ledger.changed(rows)
    assert time.perf_counter() - started < 0.3


def test_a_server_of_a_patched_build_ends_with_one_line(tmp_path: Path) -> None:
    """As a fork of the same release would: one function of server_args has another source."""
    program = (
        "import sglang.srt.server_args as m, sglang_dwdp.plugin as p\n"
        "from sglang.srt.arg_groups import parallel_hook\n"
        "from tests.unit.support.test_ledger import patched\n"
        "p.register()\n"
        "parallel_hook.handle_data_parallelism = patched\n"
        "m.prepare_server_args(['--model-path', sys.argv[1], '--tp', '2', '--device', 'cpu', '--enable-dwdp'])"
        ".resolve_once()"
    )
    from tests.fixtures.families import make_checkpoint

    make_checkpoint(tmp_path, "qwen3_moe", num_experts=8)
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + program, str(tmp_path)],
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("sglang-dwdp: error: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert "sglang.srt.arg_groups.parallel_hook.handle_data_parallelism in this SGLang is not that" in lines[0]
    assert "Traceback" not in done.stderr
