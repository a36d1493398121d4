"""What a simulation measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .scenario import Scenario

TIMELINE_LIMIT = 4000


@dataclass(frozen=True)
class Span:
    """A bar of the timeline: what a rank's kernels or copies did from ``start`` to ``end``."""

    rank: int
    kind: str
    start: float
    end: float


@dataclass
class Result:
    """What a simulation measured.

    Attributes:
        ttft: seconds from arrival to the end of the last prefill chunk, per request.
        seconds: from the first arrival to the last completion.
        tokens: prompt tokens served.
        exposed: seconds that each rank's kernels waited for copies.
        copying: seconds that each rank's copy engine was busy.
        pulled, served: bytes that each rank read from peers, and that peers read from it.
        forwards: forwards of all ranks (a DEP forward counts once per rank).
        waited: seconds that ranks of DEP groups waited for the slowest one, all ranks.
    """

    scenario: Scenario
    ttft: np.ndarray[Any, np.dtype[np.float64]]
    seconds: float
    tokens: int
    exposed: list[float]
    copying: list[float]
    pulled: list[float]
    served: list[float]
    forwards: int
    waited: float
    timeline: list[Span] = field(repr=False, default_factory=list)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Prompt tokens per second and GPU over the whole run."""
        return self.tokens / self.seconds / self.scenario.ranks

    def percentile(self, q: float) -> float:
        """The q-th percentile of TTFT in seconds."""
        return float(np.percentile(self.ttft, q))
