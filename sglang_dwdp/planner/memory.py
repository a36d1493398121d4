"""GPU memory of one rank by part, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dwdp.planner.cost import Group, equal_share, layer_fetch_bytes
from sglang_dwdp.planner.formats import Precision
from sglang_dwdp.planner.gpu import Gpu
from sglang_dwdp.planner.shape import ModelShape

# CUDA context, NCCL or copy buffers, workspaces and graph pools. SGLang's default
# --mem-fraction-static leaves 10 to 20 % for them and for activations.
RUNTIME_BYTES = 4e9


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        attention: projections, routers, shared experts, dense MLPs, embedding and head.
        experts: routed experts stored here.
        slots: buffers for other ranks' experts.
        activations: of the largest forward.
        runtime: context and workspaces.
        kv_cache: what is left (negative if nothing is).
    """

    attention: float
    experts: float
    slots: float
    activations: float
    runtime: float
    kv_cache: float

    @property
    def used(self) -> float:
        """Everything but the KV cache."""
        return self.attention + self.experts + self.slots + self.activations + self.runtime

    @property
    def fits(self) -> bool:
        """Whether anything is left for the KV cache."""
        return self.kv_cache > 0


def replicated_bytes(model: ModelShape, precision: Precision) -> float:
    """Bytes that every rank holds whatever the scheme: everything but the routed experts."""
    projections = model.layers * model.projection_params * precision.projections.bytes_per_param
    mlp = model.moe_layers * model.shared_params + model.dense_layers * model.dense_mlp_params
    plain = model.moe_layers * model.router_params + 2 * model.vocab * model.hidden
    return projections + mlp * precision.experts.bytes_per_param + plain * 2.0


def activation_bytes(model: ModelShape, precision: Precision, tokens: float) -> float:
    """Peak of one layer: residual and hidden states, and the routed copies in and out.

    tokens x (4 hidden + top_k (2 hidden + 3 intermediate)) elements.
    """
    routed = model.top_k * (2 * model.hidden + 3 * model.moe_intermediate)
    return tokens * (4 * model.hidden + routed) * precision.activation_bytes


def memory(
    model: ModelShape,
    gpu: Gpu,
    precision: Precision,
    scheme: str,
    group: Group,
    tokens: float,
) -> Memory:
    """Memory of one rank under ``dwdp``, ``in-tree dwdp``, ``dep`` or ``replica``.

    DWDP adds ``depth`` slots of the remote experts of one layer. DEP holds its share of experts
    and the tokens that it receives (on average as many as it sends).
    """
    one = model.moe_layers * model.expert_params * precision.experts.bytes_per_param
    slots = 0.0
    if scheme == "replica":
        stored = model.experts
    elif scheme == "dep":
        stored = equal_share(model, group.size)
    else:
        stored = group.stored(model)
        slots = group.depth * layer_fetch_bytes(model, precision, group)
    fixed = replicated_bytes(model, precision)
    active = activation_bytes(model, precision, tokens)
    used = fixed + stored * one + slots + active + RUNTIME_BYTES
    return Memory(fixed, stored * one, slots, active, RUNTIME_BYTES, gpu.memory - used)
