"""What one rank counts while it serves."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since the start.

    Attributes:
        direct_forwards: forwards that read peers' experts in place.
        staged_forwards: forwards that copied them first.
        forward_tokens: tokens of both.
        bytes_read_in_place: of peers' experts; counted with --dwdp-audit only.
    """

    direct_forwards: int = 0
    staged_forwards: int = 0
    forward_tokens: int = 0
    bytes_read_in_place: int = 0

    def count_forward(self, num_tokens: int, *, direct: bool) -> None:
        """Count one forward of so many tokens."""
        self.forward_tokens += num_tokens
        self.direct_forwards += direct
        self.staged_forwards += not direct

    def as_dict(self) -> dict[str, int]:
        """The totals by name, as `/server_info` shows them."""
        return dataclasses.asdict(self)
