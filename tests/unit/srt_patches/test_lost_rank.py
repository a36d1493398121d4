"""A rank that is lost is named, and what SGLang does before it ends the server is left out."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dwdp.config import DwdpConfig
from sglang_dwdp.srt_patches import lost_rank
from sglang_dwdp.srt_patches.arguments import attach
from sglang_dwdp.srt_patches.lost_rank import end_alone, end_itself, end_stalled, how_it_ended, name_lost_ranks

NAMES = ["scheduler_0", "scheduler_1", "scheduler_2", "detokenizer"]  # as SGLang has them: the controller comes first
STACKS, CORES = "SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"
CUDA = "CUDA_ENABLE_USER_TRIGGERED_COREDUMP"


def manager(codes: list[int | None], *, dwdp: bool = True) -> Any:
    arguments = SimpleNamespace(device="cuda", tp_size=2)
    attach(arguments, DwdpConfig() if dwdp else None)
    processes = [SimpleNamespace(pid=100 + i, exitcode=code) for i, code in enumerate(codes)]
    watchdog = SimpleNamespace(_names=NAMES, _processes=processes)
    return SimpleNamespace(server_args=arguments, _subprocess_watchdog=watchdog)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (STACKS, CORES, CUDA):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        del os.environ[name]


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        (2, "DWDP: rank 1 (process 102) was ended by SIGKILL (is the host out of memory?). The server ends"),
        (0, "DWDP: scheduler_0 of SGLang (process 100) was ended by SIGKILL"),
        (3, "DWDP: detokenizer of SGLang (process 103) was ended by SIGKILL"),
    ],
)
def test_the_lost_process_is_named_once(lost: int, text: str, caplog: pytest.LogCaptureFixture) -> None:
    name_lost_ranks(manager([-9 if i == lost else None for i in range(4)]))
    assert caplog.text.count("DWDP:") == 1
    assert text in caplog.text
    assert (os.environ[STACKS], os.environ[CORES]) == ("0", "0")


def test_dumps_that_the_user_asked_for_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STACKS, "1")
    monkeypatch.setenv(CUDA, "1")
    name_lost_ranks(manager([None, -9, None, None]))
    assert (os.environ[STACKS], os.environ[CORES]) == ("1", "1")


def test_a_rank_that_failed_by_itself_has_said_why(caplog: pytest.LogCaptureFixture) -> None:
    """SGLang shows the stacks of all, and waits for no cores."""
    name_lost_ranks(manager([None, None, 0, None]))
    assert not caplog.records
    assert STACKS not in os.environ
    assert os.environ[CORES] == "0"


def test_nothing_is_changed_where_dwdp_is_off(caplog: pytest.LogCaptureFixture) -> None:
    name_lost_ranks(manager([-9, None, None, None], dwdp=False))
    assert not caplog.records
    assert CORES not in os.environ


def test_ends_in_words() -> None:
    assert how_it_ended(3) == "ended with exit code 3"
    assert how_it_ended(-11) == "was ended by SIGSEGV"


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes that this process would have ended with."""
    result: list[int] = []
    monkeypatch.setattr(lost_rank.os, "_exit", result.append)
    monkeypatch.setattr(lost_rank.logging, "shutdown", lambda: None)
    return result


def test_a_rank_that_fails_ends_alone(codes: list[int], caplog: pytest.LogCaptureFixture) -> None:
    def fail(_scheduler: Any) -> None:
        raise RuntimeError("the GPU has fallen off the bus")

    end_alone(fail, None)
    assert codes == [lost_rank.FAILED]
    assert "the GPU has fallen off the bus" in caplog.text


def test_a_rank_that_is_told_to_end_ends_as_always(codes: list[int]) -> None:
    end_alone(lambda _scheduler: None, None)
    assert codes == []


def test_a_rank_whose_copies_stall_says_which(codes: list[int], caplog: pytest.LogCaptureFixture) -> None:
    end_stalled(["layer 3, 4 bytes from rank 1", "layer 4, 4 bytes from rank 2"])
    assert codes == [lost_rank.FAILED]
    assert "so this rank ends: layer 3, 4 bytes from rank 1; layer 4, 4 bytes from rank 2." in caplog.text


def test_a_watchdog_ends_its_own_process() -> None:
    watchdog = SimpleNamespace(parent_process=None)
    end_itself(None, watchdog)
    assert watchdog.parent_process.pid == os.getpid()
