"""Which rank stores which experts (pure)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from sglang_dwdp.errors import DwdpConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """Rank r of a group stores experts `boundaries[r] .. boundaries[r + 1] - 1`: its shard.

    Attributes:
        boundaries: `[group_size + 1]`, from 0 to num_experts, strictly increasing.
    """

    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        b = self.boundaries
        if len(b) < 2 or b[0] != 0 or any(x >= y for x, y in pairwise(b)):
            raise DwdpConfigError(f"boundaries of shards must rise from 0 and leave no rank empty (got {b}).")

    @property
    def num_experts(self) -> int:
        return self.boundaries[-1]

    @property
    def group_size(self) -> int:
        return len(self.boundaries) - 1

    def shard(self, rank: int) -> range:
        """The experts that `rank` stores."""
        return range(self.boundaries[rank], self.boundaries[rank + 1])

    def owner(self, expert: int) -> int:
        """The rank that stores `expert`."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} is not one of {self.num_experts}")
        return bisect_right(self.boundaries, expert) - 1

    def local_index(self, rank: int, expert: int) -> int:
        """The index of `expert` among those that `rank` stores, or -1 if `rank` does not store it.

        SGLang's weight loader skips an expert whose index is -1.
        """
        shard = self.shard(rank)
        return expert - shard.start if expert in shard else -1


def balanced(num_experts: int, group_size: int) -> Placement:
    """Contiguous shards that differ by at most one expert, for any number of experts.

    Raises:
        DwdpConfigError: there are fewer experts than ranks.
    """
    if group_size < 1 or num_experts < group_size:
        raise DwdpConfigError(
            f"{num_experts} experts cannot be shared among {group_size} ranks: every rank must store at least one. "
            f"Lower --dwdp-group-size, or --tp-size, to {max(num_experts, 1)} or less."
        )
    return Placement(tuple(rank * num_experts // group_size for rank in range(group_size + 1)))


def min_local_experts(num_experts: int, group_size: int) -> int:
    """The fewest experts that each rank may keep if the group is to have them all: the size of the largest shard."""
    return -(-num_experts // group_size)


def check_local_experts(local_experts: int | None, num_experts: int, group_size: int) -> None:
    """Check `--dwdp-local-experts` (None: not given) against the model and the group.

    Raises:
        DwdpConfigError: ranks of this group cannot keep `local_experts` experts each.
    """
    least = min_local_experts(num_experts, group_size)
    if local_experts is not None and not least <= local_experts <= num_experts:
        raise DwdpConfigError(
            f"--dwdp-local-experts {local_experts}: a group of {group_size} ranks needs at least {least} on each rank "
            f"to have all {num_experts} experts, and a rank cannot keep more than {num_experts}. "
            f"Choose a number from {least} to {num_experts}."
        )
