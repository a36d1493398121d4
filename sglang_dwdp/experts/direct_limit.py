"""Up to how many tokens `--dwdp-view auto` reads experts in place, where the user did not say (pure)."""

from __future__ import annotations

import math

from sglang_dwdp.config import DEFAULT_DIRECT_MAX_TOKENS

# Bandwidth of kernels that read over NVLink, over that of copies: 328 to 343 over 376 GB/s between two H100s with both
# directions in use.
IN_PLACE_OVER_COPY = 0.87


def direct_limit(num_experts: int, experts_per_token: int | None) -> int:
    """The largest forward, in tokens, for which reading the chosen experts in place is no slower than copying all.

    If routing is uniform, n tokens that choose k of E experts touch the share 1 - (1 - k/E)^n of them, remote or not.
    Reading that share in place, at r times the bandwidth of copies, takes as long as copying everything when

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
