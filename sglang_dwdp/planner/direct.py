"""When to read remote experts in place instead of copying them ahead.

The *staged* view needs every remote expert of every layer, whatever the tokens chose, but hides
the copies under compute. The *direct* view moves only the experts that were chosen, at the rate
at which a kernel reads over the link, and hides nothing.
"""

from __future__ import annotations

from . import kernels
from .cost import Group, dwdp, forward_parts
from .errors import PlannerError
from .formats import Precision, default_precision, get_format
from .gpu import Gpu
from .shape import ModelShape
from .workload import Batch

MAX_TOKENS = 65536


def expected_remote_experts(model: ModelShape, tokens: float, group: Group) -> float:
    """Distinct remote experts that ``tokens`` tokens are routed to in one layer.

    E (1 - (1 - k/E)^T) of E experts are chosen if routing is uniform, and (E - local)/E of them
    are remote. Skewed routing chooses fewer, so this is an upper bound on the traffic.
    """
    chosen = model.experts * float(1.0 - (1.0 - model.top_k / model.experts) ** tokens)
    return chosen * (model.experts - group.stored(model)) / model.experts


def direct_seconds(model: ModelShape, gpu: Gpu, precision: Precision, tokens: int, group: Group) -> float:
    """Seconds of one forward of ``tokens`` tokens whose kernels read remote experts in place.

    In each MoE layer the grouped product takes the longer of its own time and the remote read.
    An expert with more rows than a tile is read once per row tile (the other tiles of one row tile
    share it through the L2 cache), so traffic is multiplied by ceil(rows per expert / tile).
    """
    parts = forward_parts(model, gpu, precision, _batch(model, tokens))
    expert_bytes = model.expert_params * precision.experts.bytes_per_param
    rows = tokens * model.top_k / max(1.0, kernels.distinct_experts(model.experts, tokens * model.top_k))
    rereads = max(1.0, -(-rows // max(1, gpu.efficiency.tile_rows)))
    remote = expected_remote_experts(model, tokens, group) * expert_bytes * rereads
    read = remote / min(gpu.direct_read_bandwidth, gpu.hbm_bandwidth)
    grouped = model.moe_layers * max(parts.grouped_gemm / max(1, model.moe_layers), read)
    return parts.total - parts.grouped_gemm + grouped


def _batch(model: ModelShape, tokens: int) -> Batch:
    # Attention is the same under both views and is compared away: one short sequence per token.
    return Batch(tokens=float(tokens), pairs=float(tokens), window_pairs=float(tokens))


def direct_max_tokens(
    model: ModelShape,
    gpu: Gpu,
    group_size: int,
    *,
    weight_format: str | None = None,
    local_experts: int = 0,
    depth: int = 2,
    limit: int = MAX_TOKENS,
) -> int:
    """Largest token count of a forward for which the direct view is no slower than the staged one.

    Args:
        model: shape of the model.
        gpu: GPU data, from ``get_gpu`` or a measured profile.
        group_size: ranks of the DWDP group.
        weight_format: format of the experts; the checkpoint's own by default.
        local_experts: experts per rank; 0 for the smallest equal share.
        depth: staged layers ahead.
        limit: answer when the direct view never loses (for one rank, say).

    Returns:
        0 to ``limit`` tokens. Forwards of fewer or as many tokens should use the direct view.

    Raises:
        PlannerError: for a group that cannot hold the experts.
    """
    if limit < 1:
        raise PlannerError(f"limit must be at least 1 token, not {limit}")
    precision = default_precision(get_format(weight_format or model.expert_format))
    group = Group(group_size, local_experts, depth=depth)
    if group.stored(model) == model.experts:
        return limit

    def direct_wins(tokens: int) -> bool:
        staged = dwdp(model, gpu, precision, _batch(model, tokens), group).seconds
        return direct_seconds(model, gpu, precision, tokens, group) <= staged

    # The direct view's cost rises with tokens faster than the staged one's up to the first loss.
    low, high = 0, 1
    while high < limit and direct_wins(high):
        low, high = high, high * 2
    if low == 0:
        return 0 if not direct_wins(1) else 1
    high = min(high, limit)
    if direct_wins(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if direct_wins(middle):
            low = middle
        else:
            high = middle
    return low
