"""Streaming sessions, whose turns find their rank by themselves."""

from __future__ import annotations

from typing import ClassVar

import pytest
from sglang.test.kits.streaming_session_kit import AbortLeakReproKitMixin, StreamingSessionKitMixin
from sglang.test.server_fixtures import streaming_session_fixture as fixture

from tests.kits.server import DwdpServer

pytestmark = pytest.mark.kits
fixture.CONCURRENT_LOGPROB_ROUNDS = 1
fixture.ABORT_REPRO_ROUNDS = 2


class TestSessions(StreamingSessionKitMixin, DwdpServer):
    """Turns that inherit, aborts that roll back, and many sessions at once."""

    flags: ClassVar[tuple[str, ...]] = ("--enable-streaming-session", "--chunked-prefill-size", "64")


class TestAborts(AbortLeakReproKitMixin, DwdpServer):
    """Turns that are too long for the context, on large pages."""

    flags: ClassVar[tuple[str, ...]] = (
        "--enable-streaming-session",
        "--context-length",
        str(fixture.ABORT_REPRO_CONTEXT_LEN),
        "--page-size",
        str(fixture.ABORT_REPRO_PAGE_SIZE),
        "--chunked-prefill-size",
        str(fixture.ABORT_REPRO_CHUNKED_PREFILL_SIZE),
    )
