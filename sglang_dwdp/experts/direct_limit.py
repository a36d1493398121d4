"""How long reading chosen experts in place takes, and up to how many tokens `--dwdp-view auto` does so, where the user
did not say (pure)."""

from __future__ import annotations

import math

from sglang_dwdp.config import DEFAULT_DIRECT_MAX_TOKENS

# Bandwidth of kernels that read over NVLink, over that of copies: 328 to 343 over 376 GB/s between two H100s with both
# directions in use.
IN_PLACE_OVER_COPY = 0.87


def in_place_over_copies(tokens: int, num_experts: int, experts_per_token: int) -> float:
    """Time of reading in place the experts that tokens choose, over that of copying all.

    If routing is uniform, n tokens that choose k of E experts touch the share 1 - (1 - k/E)^n of them, remote or not.
    They are read at r times the bandwidth of copies, so it is that share over r.

    Args:
        tokens: n.
        num_experts: E.
        experts_per_token: k.
    """
    return (1 - (1 - experts_per_token / num_experts) ** tokens) / IN_PLACE_OVER_COPY


def direct_limit(num_experts: int, experts_per_token: int | None) -> int:
    """The largest forward, in tokens, for which reading the chosen experts in place is no slower than copying all.

    It takes as long when `in_place_over_copies` is 1:

        (1 - (1 - k/E)^n) / r = 1,  so  n = log(1 - r) / log(1 - k/E).

    The number of ranks, the sizes of experts and the speed of the link cancel out. Routing that is skewed touches
    fewer experts, so the true limit is no lower.

    Args:
        num_experts: routed experts of a layer, E.
        experts_per_token: k; None if unknown, for which the answer is `DEFAULT_DIRECT_MAX_TOKENS`.

    Returns:
        Tokens; 0 if every token chooses all experts.
    """
    if experts_per_token is None:
        return DEFAULT_DIRECT_MAX_TOKENS
    if experts_per_token >= num_experts:
        return 0
    return math.floor(math.log(1 - IN_PLACE_OVER_COPY) / math.log(1 - experts_per_token / num_experts))
