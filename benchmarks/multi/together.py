"""Measuring together: all ranks begin at once, and all know what each found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from sglang_dwdp.memory.handshake import Exchange

REPEATS = 3


def together(exchange: Exchange, call: Callable[[], float] | None) -> float:
    """The median of a measurement that all ranks begin at once; ranks without one wait."""
    times = []
    for _ in range(REPEATS):
        exchange.barrier()
        if call is not None:
            times.append(call())
    exchange.barrier()
    return statistics.median(times) if times else 0.0


def gathered(exchange: Exchange, value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    return [json.loads(answer) for answer in exchange.all_gather(json.dumps(value).encode())]
