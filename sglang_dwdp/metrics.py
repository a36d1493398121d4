"""What one rank counts while it serves."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since the start.

    bytes_read_in_place and collectives are counted only with --dwdp-audit.
    """

    direct_forwards: int = 0
    staged_forwards: int = 0
    forward_tokens: int = 0
    bytes_read_in_place: int = 0
    collectives: int = 0

    def count_forward(self, num_tokens: int, *, direct: bool) -> None:
        self.forward_tokens += num_tokens
        if direct:
            self.direct_forwards += 1
        else:
            self.staged_forwards += 1

    def as_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)
