"""A rank loads its shard of the experts, and weights have to arrive: each parameter, each of those experts once.

SGLang's loaders put up with a checkpoint that lacks tensors, and serve what the memory held before. A rank of DWDP
would hand that to its peers. So a model is checked when it is constructed, before anything is read, and again when
its `load_weights` returns, before weights are post-processed.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.plugins.hook_registry import HookType

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.srt_patches.checks import check_constructed, scheme_of
from sglang_dwdp.srt_patches.experts import placement_of, rank_in_group
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.srt_patches.linear import keep_rows_of_tokens, unsharded_model
from sglang_dwdp.support.models import expert_count
from sglang_dwdp.support.unwritten import has_marks, mark, mark_uninitialized

_ALL_EXPERTS = -1
_ARRIVALS = "_dwdp_arrivals"  # of a FusedMoE layer
_IS_LOADED = "_dwdp_is_loaded"  # of a model
_IS_DRAFT = "_dwdp_is_draft"  # of a model
# A draft model gets these from the model that it drafts for, after loading.
_OF_TARGET = ("embed_tokens.weight", "lm_head.weight")
_NAMED = 8  # tensors in a message
# Experts' tensors that no checkpoint has: SGLang makes them after loading.
_DERIVED = ("_g_idx_sort_indices", "_blockscale_swizzled")

Arrival = tuple[int, int, str, str]  # id of the parameter, expert, shard, the checkpoint's name


def construct(
    original: Callable[..., torch.nn.Module], model_config: Any, load_config: Any, quant_config: Any = None
) -> torch.nn.Module:
    """Around `_initialize_model`, through which every loader constructs its model.

    Raises:
        DwdpConfigError: The model is unsupported.
    """
    is_draft = bool(model_config.is_draft_model)
    is_dense_draft = is_draft and expert_count(model_config.hf_text_config) is None
    is_dummy = load_config.load_format == LoadFormat.DUMMY  # it fills all parameters, without `load_weights`
    with (
        nullcontext() if is_dummy else mark_uninitialized(),
        unsharded_model(model_config.hf_config.architectures, is_dense_draft=is_dense_draft),
    ):
        model = original(model_config, load_config, quant_config)
    check_constructed(model, is_draft=is_draft)
    keep_rows_of_tokens(model)
    if is_dummy:
        setattr(model, _IS_LOADED, True)
        return model
    setattr(model, _IS_DRAFT, is_draft)
    for name, parameter in model.named_parameters():
        # These have a value from their constructor (a norm's ones), but never the one of a trained model. Others may
        # keep it: scales, for instance, that many checkpoints leave out.
        if name.endswith((".weight", ".bias")):
            mark(parameter)
    load_weights: Any = model.load_weights
    vars(model)["load_weights"] = functools.partial(load_and_check, load_weights, model)
    return model


def load_and_check(load_weights: Callable[..., Any], model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In place of a model's `load_weights`, for its first call.

    Raises:
        DwdpSetupError: Something did not arrive, or an expert arrived twice.
    """
    del vars(model)["load_weights"]
    result = load_weights(*args, **kwargs)
    errors = [*unwritten(model), *experts_amiss(model)]
    if errors:
        more = f" and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
        raise DwdpSetupError(
            f"the checkpoint and {type(model).__name__} do not fit together: {', '.join(errors[:_NAMED])}{more}. "
            "SGLang would serve what the memory held before. Check that the checkpoint is complete and is the one of "
            "this model."
        )
    setattr(model, _IS_LOADED, True)
    return result


def check_loaded(model: torch.nn.Module) -> None:
    """Check, before experts are shared, that this model's weights were checked.

    Raises:
        DwdpSetupError: Its loader did not use the model's `load_weights`.
    """
    if not getattr(model, _IS_LOADED, False):
        raise DwdpSetupError(
            f"the weights of {type(model).__name__} did not come through its load_weights, so DWDP cannot tell "
            "whether all arrived. Use --load-format auto."
        )


def unwritten(model: torch.nn.Module) -> Iterator[str]:
    """The parameters of which something was not written."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    is_draft = getattr(model, _IS_DRAFT, False)
    for name, parameter in model.named_parameters():
        parent = name.rpartition(".")[0]
        if is_draft and name.endswith(_OF_TARGET):
            continue
        if tied and name.endswith("lm_head.weight"):  # some models keep one beside the embedding that they use
            continue
        if name.endswith(_DERIVED) or (name.endswith("g_idx") and not is_ordered(model.get_submodule(parent))):
            continue
        if has_marks(parameter):
            yield f"{name} was not loaded (or not all of it)"


def is_ordered(layer: Any) -> bool:
    """Whether a module's weights have the order of their inputs in the checkpoint (GPTQ's `desc_act`).

    SGLang makes the tensors for it anyway, and drops them after loading where it is not.
    """
    scheme = scheme_of(layer)
    config = getattr(scheme, "quant_config", None)
    return getattr(scheme, "actorder", None) == "group" or bool(getattr(config, "desc_act", False))


def shard_of(layer: Any, param: Any, loaded_weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a checkpoint's tensor of all experts, as gpt-oss has them, for a `param` of its shard.

    SGLang slices such tensors by expert parallelism, if at all.
    """
    shard = placement_of(layer).shard(rank_in_group())
    if loaded_weight.shape[0] != layer.num_global_routed_experts or param.shape[0] != len(shard):
        return loaded_weight
    return loaded_weight[shard.start : shard.stop]


def load(
    original: Callable[..., None],
    layer: Any,
    param: Any,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int | None,
) -> None:
    """Around `FusedMoE.weight_loader`, which gets all experts at once where `expert_id` is None."""
    _note(layer, param, weight_name, shard_id, _ALL_EXPERTS if expert_id is None else expert_id)
    if expert_id is None:
        loaded_weight = shard_of(layer, param, loaded_weight)
    original(layer, param, loaded_weight, weight_name, shard_id, expert_id)


def load_fused(
    original: Callable[..., None], layer: Any, param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str
) -> None:
    """Around `FusedMoE.weight_loader_fused`, which always gets all experts."""
    _note(layer, param, weight_name, shard_id, _ALL_EXPERTS)
    original(layer, param, shard_of(layer, param, loaded_weight), weight_name, shard_id)


def _note(layer: Any, param: Any, weight_name: str, shard_id: str, expert: int) -> None:
    # Some models load in several threads, which a plain counter, with a key of its own for each arrival, can bear.
    arrivals: Counter[Arrival] = vars(layer).setdefault(_ARRIVALS, Counter())
    arrivals[id(param), expert, shard_id, weight_name] += 1


def experts_amiss(model: torch.nn.Module) -> Iterator[str]:
    """The parts of this rank's experts that arrived twice, or that others have and they lack.

    Which parts there are (w1, w2, w3, or both halves in one) depends on the checkpoint: what arrived for one expert
    of one layer has to arrive for all, whose parameters have that name.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedMoE)]
    counts = [_by_parameter(layer) for layer in layers]
    parts: dict[str, set[str]] = defaultdict(set)  # by parameter
    for of_layer in counts:
        for name, arrived in of_layer.items():
            parts[name] |= {shard for _, shard, _ in arrived}
    for layer, of_layer in zip(layers, counts, strict=True):
        own = placement_of(layer).shard(rank_in_group())
        for name, arrived in of_layer.items():
            where = f"layer {layer.layer_id}, {name}"
            for (expert, shard, _), count in arrived.items():
                if count > 1 and (expert == _ALL_EXPERTS or expert in own):
                    of = "all experts" if expert == _ALL_EXPERTS else f"expert {expert}"
                    yield f"{where}: {shard} of {of} arrived {count} times"
            there = {(expert, shard) for expert, shard, _ in arrived}
            for shard in sorted(parts[name]):
                missing = [expert for expert in own if (expert, shard) not in there]
                if missing and (_ALL_EXPERTS, shard) not in there:
                    yield f"{where}: {shard} of experts {', '.join(map(str, missing))} did not arrive"


def forget_arrivals(model: torch.nn.Module) -> None:
    """Forget what arrived: an update may bring any part of the weights."""
    for module in model.modules():
        vars(module).pop(_ARRIVALS, None)


def _by_parameter(layer: Any) -> dict[str, Counter[tuple[int, str, str]]]:
    """The layer's arrivals, which are forgotten with this."""
    arrivals: Counter[Arrival] = vars(layer).pop(_ARRIVALS, Counter())
    result: dict[str, Counter[tuple[int, str, str]]] = {name: Counter() for name, _ in layer.named_parameters()}
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    for (parameter, *arrival), count in arrivals.items():
        if parameter in names:
            result[names[parameter]][tuple(arrival)] = count  # type: ignore[index]
    return result


_PATH = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"
HOOKS = (
    Hook("sglang.srt.model_loader.loader._initialize_model", HookType.AROUND, construct),
    Hook(f"{_PATH}.weight_loader", HookType.AROUND, load),
    Hook(f"{_PATH}.weight_loader_fused", HookType.AROUND, load_fused),
)
