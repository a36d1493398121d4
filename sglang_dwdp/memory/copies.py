"""Copies of a plan that continue one another."""

from __future__ import annotations

from collections.abc import Iterable

Copy = tuple[int, int, int]  # destination, source, bytes


def joined(copies: Iterable[Copy], longest: int) -> list[Copy]:
    """The same bytes in fewer copies, each at the place of its first part.

    Args:
        copies: Which do not overlap.
        longest: Bytes of a copy that is made of several, at most.
    """
    result: list[Copy] = []
    open_ends: dict[tuple[int, int], int] = {}  # where a copy ends, in both: its index
    for destination, source, nbytes in copies:
        index = open_ends.pop((destination, source), None)
        if index is not None and result[index][2] + nbytes <= longest:
            first, begin, before = result[index]
            result[index] = (first, begin, before + nbytes)
        else:
            index = len(result)
            result.append((destination, source, nbytes))
        open_ends[destination + nbytes, source + nbytes] = index
    return result
