"""Model shapes from a Hugging Face `config.json`, or from the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from sglang_dwdp.planner.checks import PlannerError, one_line, read_mapping
from sglang_dwdp.planner.formats import format_of_config
from sglang_dwdp.planner.shape import ModelShape
from sglang_dwdp.support.models import EXPERT_COUNT_KEYS

BUILTIN_CONFIGS = read_mapping(Path(__file__).with_name("models.yaml"), "built-in models", yaml=True)
# No model's dimension comes near; beyond it a config is nonsense.
LARGEST = 10**8
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Maybe = Annotated[int, Field(ge=0, le=LARGEST)]


class _Config(BaseModel):
    """The fields of a `config.json` that matter, by the names in use; 0 for what a model does not have."""

    model_config = ConfigDict(extra="ignore")

    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Maybe = 0
    head_dim: Maybe = 0
    vocab_size: Size = 32000
    experts: Annotated[int, Field(ge=2, le=100_000, validation_alias=AliasChoices(*EXPERT_COUNT_KEYS))]
    top_k: Annotated[
        int,
        Field(ge=1, validation_alias=AliasChoices("num_experts_per_tok", "experts_per_token", "num_experts_per_token")),
    ]
    moe_intermediate_size: Maybe = 0
    intermediate_size: Maybe = 0
    n_shared_experts: Maybe = 0
    shared_expert_intermediate_size: Maybe = 0
    q_lora_rank: Maybe = 0
    kv_lora_rank: Maybe = 0
    qk_nope_head_dim: Maybe = 0
    qk_rope_head_dim: Maybe = 0
    v_head_dim: Maybe = 0
    first_k_dense_replace: Maybe = 0
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[int] = []
    mlp_layer_types: list[str] = []
    moe_layer_freq: int | list[int] = 1  # DeepSeek's is a number, which is 1; a list has one for each layer
    layer_types: list[str] = []
    sliding_window: Maybe = 0
    quantization_config: dict[str, Any] = {}

    def dense_layers(self) -> int:
        """Layers without experts, by any of the ways in which configs say so."""
        layers, step, every = self.num_hidden_layers, self.decoder_sparse_step, self.moe_layer_freq
        dense = {*range(self.first_k_dense_replace), *self.mlp_only_layers}
        dense |= {i for i in range(layers) if (i + 1) % step}
        dense |= {i for i, kind in enumerate(self.mlp_layer_types) if kind == "dense"}
        dense |= {i for i, mixed in enumerate(every) if not mixed} if isinstance(every, list) else set()
        return len(dense & set(range(layers)))


def model_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Read a Hugging Face `config.json` mapping.

    Raises:
        PlannerError: if a needed field is missing or the config makes no sense.
    """
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise PlannerError(f"the config of {name}: text_config must be a mapping")
    quantization = text.get("quantization_config") or config.get("quantization_config")
    present = {key: value for key, value in {**text, "quantization_config": quantization}.items() if value is not None}
    try:
        return _shape(_Config.model_validate(present), name)
    except ValidationError as error:
        raise PlannerError(
            f"the config of {name}: {one_line(error)}; is it the config.json of a mixture-of-experts language model?"
        ) from None
    except (AttributeError, TypeError, ValueError) as error:  # of what is nested more deeply
        raise PlannerError(f"the config of {name} cannot be understood: {error}") from None


def _shape(c: _Config, name: str) -> ModelShape:
    dense = c.dense_layers()
    intermediate = c.moe_intermediate_size or c.intermediate_size
    if c.top_k > c.experts or dense == c.num_hidden_layers or not intermediate:
        raise ValueError(
            f"{c.top_k} of {c.experts} experts of width {intermediate} per token, {dense} of {c.num_hidden_layers} "
            "layers dense: not a mixture of experts"
        )
    qk_dim = v_dim = c.head_dim or max(1, c.hidden_size // c.num_attention_heads)
    if c.kv_lora_rank:
        qk_dim, v_dim = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    windowed = c.layer_types.count("sliding_attention")
    return ModelShape(
        name=name,
        hidden=c.hidden_size,
        layers=c.num_hidden_layers,
        dense_layers=dense,
        experts=c.experts,
        top_k=c.top_k,
        moe_intermediate=intermediate,
        dense_intermediate=c.intermediate_size or intermediate,
        shared_intermediate=c.shared_expert_intermediate_size or c.n_shared_experts * intermediate,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads or c.num_attention_heads,
        qk_dim=qk_dim,
        v_dim=v_dim,
        vocab=c.vocab_size,
        q_rank=c.q_lora_rank,
        kv_rank=c.kv_lora_rank,
        rope_dim=c.qk_rope_head_dim,
        window=c.sliding_window if windowed else 0,
        window_layers=windowed,
        expert_format=format_of_config(c.quantization_config),
    )


def load_model(name_or_path: str) -> ModelShape:
    """A built-in shape by name (any organisation prefix is ignored), or a `config.json`.

    Args:
        name_or_path: `Qwen/Qwen3-30B-A3B`, a directory that holds `config.json`, or the file.

    Raises:
        PlannerError: if neither a file nor a known name; the message lists the known names.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        name = path.absolute().parent.name if path.name == "config.json" else path.stem
        return model_from_config(read_mapping(path, "model config"), name)
    key = name_or_path.rsplit("/", 1)[-1].lower()
    if key not in BUILTIN_CONFIGS:
        raise PlannerError(
            f"{name_or_path!r} is neither a config.json nor a built-in model; built in: "
            f"{', '.join(sorted(BUILTIN_CONFIGS))}. For another model give the path of its config.json."
        )
    return model_from_config(BUILTIN_CONFIGS[key], key)
