"""Which ranks have seen the beginning of a prompt, as far as the controller knows from where it sent prompts.

What a rank has evicted meanwhile is not known, so this says where to look, and no more.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

_BLOCK = 64  # tokens


class PrefixTable:
    """The blocks of tokens that prompts began with, by all that came before them; the longest unused go first.

    Args:
        ranks: Of the server.
        capacity: Blocks that are kept, each some 200 bytes.
    """

    def __init__(self, ranks: int, capacity: int = 1 << 17) -> None:
        self._ranks, self._capacity = ranks, capacity
        self._blocks: OrderedDict[int, int] = OrderedDict()  # to a mask of ranks

    def hits(self, ids: array[int]) -> list[int]:
        """How many of a prompt's first tokens each rank has seen: `[ranks]`."""
        result = [0] * self._ranks
        there = (1 << self._ranks) - 1
        for number, key in enumerate(_keys(ids), 1):
            there &= self._blocks.get(key, 0)
            if not there:
                break
            for rank in range(self._ranks):
                if there >> rank & 1:
                    result[rank] = number * _BLOCK
        return result

    def add(self, ids: array[int], rank: int) -> None:
        """A prompt was sent to a rank."""
        for key in _keys(ids):
            self._blocks[key] = self._blocks.pop(key, 0) | 1 << rank
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)


def cheapest(pending: Sequence[int], requests: Sequence[int], hits: Sequence[int]) -> int:
    """The rank with the fewest pending tokens, where those of a prompt that it need not compute count for it.

    Args:
        pending: Tokens of each rank, `[ranks]`.
        requests: Requests of each rank, which decide where tokens are equal.
        hits: Tokens of the prompt that each rank has seen.
    """
    return min(range(len(pending)), key=lambda rank: (pending[rank] - hits[rank], requests[rank]))


def _keys(ids: array[int]) -> Iterator[int]:
    key = 0
    for start in range(0, len(ids) - _BLOCK + 1, _BLOCK):
        key = hash((key, ids[start : start + _BLOCK].tobytes()))
        yield key
