"""The one error that the planner raises for bad input."""

from __future__ import annotations

from sglang_dwdp.errors import DwdpError


class PlannerError(DwdpError, ValueError):
    """Bad input: the message says what is wrong and what to do about it."""
