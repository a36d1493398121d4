"""Model shapes from a Hugging Face ``config.json``, or from the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .builtin_models import ALIASES, BUILTIN_CONFIGS
from .checks import read_json
from .errors import PlannerError
from .shape import Mla, ModelShape

# No dimension of a model comes near; beyond it a config is nonsense, and products of dimensions lose their sense.
LARGEST = 10**8
MOST_LAYERS = 10_000
MOST_EXPERTS = 100_000


def _count(key: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
    """``value`` as a count; JSON writers may have made 128.0 of 128."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise PlannerError(f"the model config says {key} {value!r}: not a whole number")
    if not least <= value <= most:
        raise PlannerError(f"the model config says {key} {value}: must be {least} to {most:,}")
    return int(value)


def _optional(config: Mapping[str, Any], key: str) -> int:
    """A count that may be missing or null: 0 then."""
    return _count(key, config.get(key) or 0)


def _first(config: Mapping[str, Any], *keys: str, default: int | None = None, most: int = LARGEST) -> int:
    """The first of ``keys`` that the config has, at least 1."""
    for key in keys:
        if config.get(key) is not None:
            return _count(key, config[key], least=1, most=most)
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
    dense = _optional(config, "first_k_dense_replace")
    step = _optional(config, "decoder_sparse_step") or 1
    only = {_count("mlp_only_layers", i) for i in config.get("mlp_only_layers") or ()}
    stepped = {i for i in range(layers) if (i + 1) % step}
    named = {i for i, kind in enumerate(config.get("mlp_layer_types") or ()) if kind == "dense"}
    every = config.get("moe_layer_freq")  # DeepSeek's is a number, which is 1; a list has one for each layer
    unmixed = {i for i, mixed in enumerate(every) if not mixed} if isinstance(every, list) else set()
    return len((set(range(dense)) | only | stepped | named | unmixed) & set(range(layers)))


def model_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Read a Hugging Face ``config.json`` mapping.

    Raises:
        PlannerError: if a needed field is missing, with its known spellings, or the config makes no sense.
    """
    try:
        return _read(config, name)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, PlannerError):
            raise
        raise PlannerError(f"the model config cannot be understood ({type(error).__name__}: {error})") from None


def _read(config: Mapping[str, Any], name: str) -> ModelShape:
    quantization = config.get("quantization_config")
    config = config.get("text_config") or config
    if quantization and not config.get("quantization_config"):
        config = {**config, "quantization_config": quantization}
    layers = _first(config, "num_hidden_layers", most=MOST_LAYERS)
    hidden = _first(config, "hidden_size")
    heads = _first(config, "num_attention_heads")
    experts = _first(config, "n_routed_experts", "num_experts", "num_local_experts", most=MOST_EXPERTS)
    top_k = _first(config, "num_experts_per_tok", "experts_per_token", "num_experts_per_token")
    if experts < 2 or not 1 <= top_k <= experts:
        raise PlannerError(f"the model config says {top_k} of {experts} experts per token: no mixture of experts")
    intermediate = _first(config, "moe_intermediate_size", "intermediate_size")
    shared = _optional(config, "n_shared_experts") * intermediate
    shared = _optional(config, "shared_expert_intermediate_size") or shared
    head_dim = _first(config, "head_dim", default=max(1, hidden // heads))
    mla, qk_dim, v_dim = None, head_dim, head_dim
    if config.get("kv_lora_rank"):
        rope = _first(config, "qk_rope_head_dim")
        mla = Mla(_optional(config, "q_lora_rank"), _first(config, "kv_lora_rank"), rope)
        qk_dim, v_dim = _first(config, "qk_nope_head_dim") + rope, _first(config, "v_head_dim")
    dense = _dense_layers(config, layers)
    if dense == layers:
        raise PlannerError(f"the model config makes all {layers} layers dense: no mixture of experts")
    types = config.get("layer_types") or ()
    windowed = sum(1 for kind in types if kind == "sliding_attention")
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        dense_layers=dense,
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
        window=_optional(config, "sliding_window") if windowed else 0,
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
        name = path.absolute().parent.name if path.name == "config.json" else path.stem
        return model_from_config(read_json(path, "model config"), name)
    key = name_or_path.rsplit("/", 1)[-1].lower()
    key = ALIASES.get(key, key)
    if key not in BUILTIN_CONFIGS:
        known = ", ".join(sorted([*BUILTIN_CONFIGS, *ALIASES]))
        raise PlannerError(
            f"{name_or_path!r} is neither a config.json nor a built-in model; built in: {known}. "
            "For another model give the path of its config.json."
        )
    return model_from_config(BUILTIN_CONFIGS[key], key)
