"""GPU memory of one rank by part, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dwdp.planner.cost import Group, equal_share, layer_fetch_bytes
from sglang_dwdp.planner.formats import Precision
from sglang_dwdp.planner.gpus import Gpu
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
    def fits(self) -> bool:
        """Whether anything is left for the KV cache."""
        return self.kv_cache > 0


def memory(model: ModelShape, gpu: Gpu, precision: Precision, scheme: str, group: Group, tokens: float) -> Memory:
    """Memory of one rank under `dwdp`, `in-tree dwdp`, `dep` or `replica`.

    Every rank holds everything but the routed experts. DWDP adds `depth` slots of the remote experts of one layer.
    DEP holds its share of experts and the tokens that it receives (on average as many as it sends). Activations peak in
    one layer: residual and hidden states, and the routed copies in and out, tokens x (4 hidden + top_k (2 hidden + 3
    intermediate)) elements.
    """
    one = model.moe_layers * model.expert_params * precision.experts.bytes_per_param
    stored, slots = model.experts, 0.0
    if scheme == "dep":
        stored = equal_share(model, group.size)
    elif scheme != "replica":
        stored = group.stored(model)
        slots = group.depth * layer_fetch_bytes(model, precision, group)
    fixed = model.layers * model.projection_params * precision.projections.bytes_per_param
    fixed += model.replicated_mlp_params * precision.experts.bytes_per_param
    fixed += 2.0 * ((model.moe_layers * model.experts + 2 * model.vocab) * model.hidden)
    routed = model.top_k * (2 * model.hidden + 3 * model.moe_intermediate)
    active = tokens * (4 * model.hidden + routed) * precision.activation_bytes
    used = fixed + stored * one + slots + active + RUNTIME_BYTES
    return Memory(fixed, stored * one, slots, active, RUNTIME_BYTES, gpu.memory - used)
