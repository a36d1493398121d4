"""The shape of a mixture-of-experts model, as the cost model needs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .builtin_models import ALIASES, BUILTIN_CONFIGS
from .errors import PlannerError


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): ranks and head sizes."""

    q_rank: int
    kv_rank: int
    rope_dim: int


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of one model; all counts are plain integers, parameters are counted once.

    Attributes:
        qk_dim, v_dim: head sizes of the query-key product and of the values.
        window: sliding-window length in tokens of the ``window_layers`` layers; 0 for none.
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
    mla: Mla | None = None
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
    def shared_params(self) -> int:
        """Parameters of one layer's shared experts."""
        return 3 * self.hidden * self.shared_intermediate

    @property
    def dense_mlp_params(self) -> int:
        """Parameters of the MLP of one dense layer."""
        return 3 * self.hidden * self.dense_intermediate

    @property
    def router_params(self) -> int:
        """Parameters of one router (kept in 16 bits)."""
        return self.hidden * self.experts

    @property
    def projection_params(self) -> int:
        """Parameters of one layer's attention projections."""
        out = self.heads * self.v_dim * self.hidden
        if self.mla is None:
            kv = self.hidden * self.kv_heads * (self.qk_dim + self.v_dim)
            return self.hidden * self.heads * self.qk_dim + kv + out
        nope = self.qk_dim - self.mla.rope_dim
        query = self.hidden * self.mla.q_rank + self.mla.q_rank * self.heads * self.qk_dim
        if self.mla.q_rank == 0:
            query = self.hidden * self.heads * self.qk_dim
        down = self.hidden * (self.mla.kv_rank + self.mla.rope_dim)
        up = self.mla.kv_rank * self.heads * (nope + self.v_dim)
        return query + down + up + out

    @property
    def kv_elements_per_token(self) -> int:
        """Cached elements per token and layer (latent and rotary part for MLA)."""
        if self.mla is not None:
            return self.mla.kv_rank + self.mla.rope_dim
        return self.kv_heads * (self.qk_dim + self.v_dim)

    @property
    def total_params(self) -> int:
        """All parameters, with untied embedding and output head; norms left out."""
        moe = self.experts * self.expert_params + self.shared_params + self.router_params
        return (
            self.layers * self.projection_params
            + self.moe_layers * moe
            + self.dense_layers * self.dense_mlp_params
            + 2 * self.vocab * self.hidden
        )

    def attention_flops(self, pairs: float) -> float:
        """FLOP of one layer's attention over ``pairs`` (query, key) pairs: 2 (d_qk + d_v) per head."""
        return 2.0 * pairs * self.heads * (self.qk_dim + self.v_dim)


def _first(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    for key in keys:
        if config.get(key) is not None:
            return int(config[key])
    if default is not None:
        return default
    raise PlannerError(
        f"the model config has none of {', '.join(keys)}; is it the config.json of a mixture-of-experts language model?"
    )


def format_of_quantization(method: str, algorithm: str = "", bits: int | None = None) -> str:
    """The weight format behind a quantisation's names, as checkpoints and SGLang's ``--quantization`` write them.

    Returns:
        A name of ``formats.FORMATS``, or ``method`` itself where none fits: ``get_format`` refuses it by name.
    """
    method, algorithm = method.lower(), algorithm.lower()
    for name in ("nvfp4", "mxfp4", "mxfp8"):
        if name in method or name in algorithm:
            return name
    if method == "modelopt_fp4":
        return "nvfp4"
    if "fp8" in method or "fp8" in algorithm or "e4m3" in algorithm or algorithm == "float-quantized":
        return "fp8"
    if method.split("_")[0] in {"awq", "gptq", "compressed-tensors", "auto-round", "moe"} and bits in (None, 4):
        return "int4"
    return method or "bf16"


def _expert_format(config: Mapping[str, Any]) -> str:
    quant = config.get("quantization_config") or {}
    method = str(quant.get("quant_method", ""))
    algorithm = str(quant.get("quant_algo", "") or quant.get("fmt", "") or quant.get("format", ""))
    bits = quant.get("bits")
    for group in (quant.get("config_groups") or {}).values():  # compressed-tensors
        bits = (group.get("weights") or {}).get("num_bits", bits)
    return format_of_quantization(method, algorithm, None if bits is None else int(bits))


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    dense = int(config.get("first_k_dense_replace") or 0)
    step = int(config.get("decoder_sparse_step") or 1)
    only = {int(i) for i in config.get("mlp_only_layers") or ()}
    stepped = {i for i in range(layers) if (i + 1) % step}
    return len(set(range(dense)) | only | stepped)


def model_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Read a Hugging Face ``config.json`` mapping.

    Raises:
        PlannerError: if a needed field is missing; the message names its known spellings.
    """
    quantization = config.get("quantization_config")
    config = config.get("text_config") or config
    if quantization and not config.get("quantization_config"):
        config = {**config, "quantization_config": quantization}
    layers = _first(config, "num_hidden_layers")
    hidden = _first(config, "hidden_size")
    heads = _first(config, "num_attention_heads")
    experts = _first(config, "n_routed_experts", "num_experts", "num_local_experts")
    top_k = _first(config, "num_experts_per_tok", "experts_per_token", "num_experts_per_token")
    if experts < 2 or not 1 <= top_k <= experts:
        raise PlannerError(f"the model config says {top_k} of {experts} experts per token: no mixture of experts")
    intermediate = _first(config, "moe_intermediate_size", "intermediate_size")
    shared = int(config.get("n_shared_experts") or 0) * intermediate
    shared = int(config.get("shared_expert_intermediate_size") or shared)
    head_dim = _first(config, "head_dim", default=hidden // heads)
    mla, qk_dim, v_dim = None, head_dim, head_dim
    if config.get("kv_lora_rank"):
        rope = _first(config, "qk_rope_head_dim")
        mla = Mla(int(config.get("q_lora_rank") or 0), int(config["kv_lora_rank"]), rope)
        qk_dim, v_dim = _first(config, "qk_nope_head_dim") + rope, _first(config, "v_head_dim")
    types = config.get("layer_types") or ()
    windowed = sum(1 for kind in types if kind == "sliding_attention")
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        dense_layers=_dense_layers(config, layers),
        experts=experts,
        top_k=top_k,
        moe_intermediate=intermediate,
        dense_intermediate=_first(config, "intermediate_size", default=intermediate),
        shared_intermediate=shared,
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads", default=heads),
        qk_dim=qk_dim,
        v_dim=v_dim,
        vocab=_first(config, "vocab_size", default=32000),
        mla=mla,
        window=int(config.get("sliding_window") or 0) if windowed else 0,
        window_layers=windowed,
        expert_format=_expert_format(config),
    )


def load_model(name_or_path: str) -> ModelShape:
    """A built-in shape by name (any organisation prefix is ignored), or a ``config.json``.

    Args:
        name_or_path: ``Qwen/Qwen3-30B-A3B``, a directory that holds ``config.json``, or the file.

    Raises:
        PlannerError: if neither a file nor a known name; the message lists the known names.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise PlannerError(f"{path} is not valid JSON: {error}") from None
        return model_from_config(config, path.parent.name or path.stem)
    key = name_or_path.rsplit("/", 1)[-1].lower()
    key = ALIASES.get(key, key)
    if key not in BUILTIN_CONFIGS:
        known = ", ".join(sorted([*BUILTIN_CONFIGS, *ALIASES]))
        raise PlannerError(
            f"{name_or_path!r} is neither a config.json nor a built-in model; built in: {known}. "
            "For another model give the path of its config.json."
        )
    return model_from_config(BUILTIN_CONFIGS[key], key)
