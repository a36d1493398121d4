"""How often several ranks pull from the same source (paper section 4.3.1), and what it costs."""

from __future__ import annotations

from math import comb

from sglang_dwdp.planner.errors import PlannerError


def contention_probabilities(group_size: int) -> list[float]:
    """Pr[C = 1], Pr[C = 2], ... for one pull; C counts the pulls on its source, itself included.

    Each of the other N - 2 possible readers of the source picks it with probability 1/(N-1), so
    C = 1 + Binomial(N-2, 1/(N-1)) (arXiv 2604.01621, equation 2).

    Raises:
        PlannerError: for fewer than 2 ranks.
    """
    _check(group_size)
    others, chance = group_size - 2, 1 / (group_size - 1)
    return [comb(others, x) * chance**x * (1 - chance) ** (others - x) for x in range(others + 1)]


def serial_slowdown(group_size: int, uncontended: float, window: float) -> float:
    """How much longer serial whole-peer pulls take because sources are shared.

    A pull that meets X others runs at 1/(1+X) of the rate, and E[X] = f (N-2)/(N-1) when peers
    copy for a fraction f of the time. f itself is (slowed time / period), hence the fixed point
    t = t0 (1 + q t / T) with q = (N-2)/(N-1), T the period that hides the copies; once t reaches
    T the copies never stop and t = t0 (1 + q).

    Args:
        uncontended: seconds t0 that the copies of one period take alone.
        window: seconds T of compute that they hide under.

    Returns:
        t / t0, at least 1.
    """
    _check(group_size)
    if uncontended <= 0:
        return 1.0
    q = (group_size - 2) / (group_size - 1)
    hidden = 1 - q * uncontended / window if window > 0 else 0.0
    if hidden > 0 and uncontended / hidden <= window:
        return 1 / hidden
    return 1 + q


def _check(group_size: int) -> None:
    if group_size < 2:
        raise PlannerError(f"a group that copies has at least 2 ranks, not {group_size}")
