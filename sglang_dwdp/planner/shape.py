"""The shape of a mixture-of-experts model, as the cost model needs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of one model; all counts are plain integers, parameters are counted once.

    Attributes:
        qk_dim, v_dim: head sizes of the query-key product and of the values.
        q_rank, kv_rank, rope_dim: ranks and rotary size of a head in multi-head latent attention (DeepSeek-V2, arXiv
            2405.04434), with which kv_rank is not 0; a q_rank of 0 leaves the query whole.
        window: sliding-window length in tokens of the `window_layers` layers; 0 for none.
        shared_intermediate: width of the shared experts together; 0 for none.
        expert_format: name of the weight format that the checkpoint ships its experts in.
    """

    name: str
    hidden: int
    layers: int
    dense_layers: int
    experts: int
    top_k: int
    moe_intermediate: int
    dense_intermediate: int
    shared_intermediate: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    vocab: int
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    window: int = 0
    window_layers: int = 0
    expert_format: str = "bf16"

    @property
    def moe_layers(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return self.layers - self.dense_layers

    @property
    def expert_params(self) -> int:
        """Parameters of one expert: gate, up and down projections."""
        return 3 * self.hidden * self.moe_intermediate

    @property
    def replicated_mlp_params(self) -> int:
        """Parameters of all layers' shared experts and dense MLPs."""
        width = self.moe_layers * self.shared_intermediate + self.dense_layers * self.dense_intermediate
        return 3 * self.hidden * width

    @property
    def projection_params(self) -> int:
        """Parameters of one layer's attention projections."""
        out = self.heads * self.v_dim * self.hidden
        query = self.hidden * self.heads * self.qk_dim
        if not self.kv_rank:
            return query + self.hidden * self.kv_heads * (self.qk_dim + self.v_dim) + out
        if self.q_rank:
            query = self.q_rank * (self.hidden + self.heads * self.qk_dim)
        down = self.hidden * (self.kv_rank + self.rope_dim)
        up = self.kv_rank * self.heads * (self.qk_dim - self.rope_dim + self.v_dim)
        return query + down + up + out
