"""FusedMoE: which experts a rank creates, and the layer as the runtime sees it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_executor.model_runner_components.moe_ep_setup import check_quantized_moe_compatibility
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.experts.placement import Placement, balanced
from sglang_dwdp.srt_patches.checks import backend_of_layer, check_expert_state, scheme_of
from sglang_dwdp.srt_patches.hooks import Hook
from sglang_dwdp.support.backends import MoeBackend, is_validated
from sglang_dwdp.support.gpu import gpu_generation

logger = logging.getLogger(__name__)
_WEIGHTS = (("w13_weight", "w2_weight"), ("w13_weight_packed", "w2_weight_packed"), ("w13_qweight", "w2_qweight"))
_INPUT_SCALES = ("w13_input_scale", "w2_input_scale")
# Of SGLang's NVFP4 method, by backend: what its kernel does not read, though it is there for each expert.
_SWIZZLED, _PLAIN = ("w13_blockscale_swizzled", "w2_blockscale_swizzled"), ("w13_weight_scale", "w2_weight_scale")
_UNREAD = {
    "marlin": _SWIZZLED,
    "flashinfer_trtllm": _SWIZZLED,
    "flashinfer_trtllm_routed": _SWIZZLED,
    "flashinfer_cutlass": _PLAIN,
}
_COUNT = "_num_local_routed"
_CLAMPS = "_cutlass_swiglu_params"


def rank_in_group() -> int:
    """This rank's place among the `dwdp_size` neighbouring ranks that share one set of experts."""
    parallel = get_parallel()  # `tp_rank` is 0 where a model is constructed as if this were the only rank
    return int(parallel.world_group.rank_in_group) % int(parallel.dwdp_size)


def group_number() -> int:
    """Which of the server's groups this rank is in."""
    parallel = get_parallel()
    return int(parallel.world_group.rank_in_group) // int(parallel.dwdp_size)


def placement_of(layer: Any) -> Placement:
    """Which rank stores which routed experts of a FusedMoE layer."""
    return balanced(layer.num_global_routed_experts, get_parallel().dwdp_size)


class ShardCount:
    """`FusedMoE._num_local_routed`: the experts that a layer has memory for.

    SGLang divides the experts evenly, and asserts that they can be. While a layer is built, this returns the size
    of the rank's shard instead, so that its tensors are created and loaded at that size; binding the full tensors
    later sets the count of all experts, as in SGLang's own code.
    """

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        if _COUNT not in layer.__dict__:
            raise AttributeError(_COUNT)
        return layer.__dict__[_COUNT]

    def __set__(self, layer: Any, count: int) -> None:
        being_built = "_dwdp_bound" not in layer.__dict__  # the last thing that __init__ sets
        layer.__dict__[_COUNT] = len(placement_of(layer).shard(rank_in_group())) if being_built else count


def build(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """Around `FusedMoE.__init__`: every rank runs all experts, at their full width.

    The server's arguments leave the MoE's tensor parallelism at tp_size, the only factorisation that SGLang's
    models accept beside expert parallelism; for a rank of DWDP both are 1.
    """
    with get_parallel().override(
        moe_tp_size=1, moe_tp_rank=0, moe_dp_size=get_parallel().tp_size, moe_dp_rank=get_parallel().tp_rank
    ):
        original(layer, *args, **kwargs)
    load_all_input_scales(layer)


def load_all_input_scales(layer: Any) -> None:
    """Make room for the static activation scales of all experts, of which SGLang takes the largest after loading.

    So every rank gets the scale of a rank that holds all experts. SGLang's loader fills such a parameter by an
    expert's number in the model, as its own NVFP4 method wants it.
    """
    for name in _INPUT_SCALES:
        scale = layer._parameters.get(name)
        if scale is not None and scale.ndim and scale.shape[0] == layer.num_local_experts < layer.num_experts:
            scale.data = scale.data.new_ones((layer.num_experts, *scale.shape[1:]))
            scale._sglang_require_global_experts = True


def weight_names(layer: Any) -> tuple[str, str] | None:
    """The names of a layer's weights, which differ by format; None if it has none that are known."""
    held = layer._parameters
    return next((names for names in _WEIGHTS if all(held.get(name) is not None for name in names)), None)


def check_blocks(runner: Any) -> None:
    """In place of `ModelRunner.check_quantized_moe_compatibility`: no rank has a part of an expert.

    SGLang's own call wants a block's width to divide an expert's width divided by the ranks.

    Raises:
        ValueError: SGLang's, for experts whose width is not a multiple of a block's.
    """
    check_quantized_moe_compatibility(model_config=runner.model_config, tp_size=1, moe_ep_size=1, moe_dp_size=1)


def local_index(layer: Any, expert_id: int) -> int:
    """In place of `FusedMoE._map_global_expert_id_to_local_expert_id`: -1 for an expert of another rank."""
    return placement_of(layer).local_index(rank_in_group(), expert_id)


def deferred_finalize(original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `FusedMoE.forward_deferred_finalize`, which runs experts without `forward_impl`.

    What it leaves for later reads no weights.
    """
    from sglang_dwdp.srt_patches.forward import current_runtime

    if not layer._dwdp_bound:
        return original(layer, *args, **kwargs)
    runtime = current_runtime()
    runtime.wait(layer.layer_id)
    output = original(layer, *args, **kwargs)
    runtime.release(layer.layer_id)
    return output


def count_reads(original: Callable[..., Any], layer: Any, hidden_states: Any, topk_output: Any, **kwargs: Any) -> Any:
    """Around `FusedMoE.forward_impl`, with --dwdp-audit only."""
    from sglang_dwdp.srt_patches.forward import current_runtime

    topk_ids = getattr(topk_output, "topk_ids", None)
    if topk_ids is not None:
        current_runtime().count_reads(layer.layer_id, topk_ids)
    return original(layer, hidden_states, topk_output, **kwargs)


class SglangLayer:
    """A FusedMoE as an `ExpertLayer`."""

    def __init__(self, layer: Any) -> None:
        self.fused = layer
        self.layer_id: int = layer.layer_id
        self.placement = placement_of(layer)
        self._weights = weight_names(layer) or _WEIGHTS[0]

    def shards(self) -> Mapping[str, torch.Tensor]:
        layer = self.fused
        weights = {name: getattr(layer, name) for name in self._weights}
        tensors = weights | dict(layer.named_per_expert_tensors(layer.num_local_experts))
        return {name: tensor for name, tensor in tensors.items() if tensor.numel()}

    def is_weight(self, name: str) -> bool:
        return name in self._weights

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        layer = self.fused
        # Permutations that no expert has are tensors `[experts, 0]`.
        empty = {n: t for n, t in layer.named_per_expert_tensors(layer.num_local_experts) if not t.numel()}
        count = self.placement.num_experts
        layer.bind_full_expert_weights(
            {**tensors, **{name: tensor.new_empty((count, *tensor.shape[1:])) for name, tensor in empty.items()}}
        )
        rebuild_state(layer)

    def use(self, tensors: Mapping[str, torch.Tensor]) -> None:
        replace = self.fused.replace_expert_tensor
        for name, tensor in tensors.items():
            replace(name, tensor)


def rebuild_state(layer: Any) -> None:
    """Make what SGLang keeps for each expert outside of the layer's tensors again, now for all experts."""
    if getattr(layer, _CLAMPS, None) is not None:
        from sglang.srt.layers.moe.moe_runner.flashinfer_cutlass import materialize_swiglu_params_for_cutlass

        layer._cutlass_swiglu_params = materialize_swiglu_params_for_cutlass(
            layer.moe_runner_config, int(layer.num_local_experts), layer.w13_weight.device
        )


def drop_unread(layer: Any) -> None:
    """Free what no kernel reads of the tensors that SGLang's NVFP4 method keeps for each expert."""
    if type(layer.quant_method).__name__ == "ModelOptNvFp4FusedMoEMethod":
        for name in _UNREAD.get(layer.runner_backend.value, ()):
            setattr(layer, name, None)


@contextmanager
def as_loaded(layer: Any) -> Iterator[None]:
    """While a layer has this rank's shard for its tensors, as when it was loaded, its counts are the shard's too."""
    config, count = layer.moe_runner_config, len(placement_of(layer).shard(rank_in_group()))
    before = layer._num_local_routed, layer.num_local_experts, config.num_local_experts
    made = vars(layer).get(_CLAMPS)  # made anew by post-processing; graphs hold the address of the old ones
    layer._num_local_routed = layer.num_local_experts = config.num_local_experts = count
    try:
        yield
    finally:
        layer._num_local_routed, layer.num_local_experts, config.num_local_experts = before
        if made is not None:
            setattr(layer, _CLAMPS, made)


def collect_all(target: torch.nn.Module, drafts: Sequence[torch.nn.Module], device: str) -> list[SglangLayer]:
    """The MoE layers of a model and of those that draft for it, in the order in which a prefill runs them.

    Every model counts its layers from 0. Those of drafts get numbers after the target's here, by which SGLang calls
    the runtime.

    Raises:
        DwdpConfigError: See `collect`.
    """
    layers = collect(target, device)
    for draft in drafts:
        for layer in collect(draft, device):
            layer.fused.layer_id = layer.layer_id = layers[-1].layer_id + 1
            layers.append(layer)
    return layers


def collect(model: torch.nn.Module, device: str) -> list[SglangLayer]:
    """The MoE layers of a model on `device`, in the order in which it runs them.

    Raises:
        DwdpConfigError: one that cannot be shared, which could not be seen before the weights were loaded (see
            `checks.check_constructed`).
    """
    found = [module for module in model.modules() if isinstance(module, FusedMoE)]
    backends = Counter[MoeBackend]()
    for layer in found:
        if device == "cuda":
            backends[backend_of_layer(layer)] += 1
            check_expert_state(layer)
            drop_unread(layer)
        if weight_names(layer) is None:
            raise DwdpConfigError(
                f"layer {layer.layer_id} has no weights of a known name: the weight format "
                f"{type(scheme_of(layer)).__name__} keeps experts in a way that DWDP does not support. Use another "
                "quantization or --moe-runner-backend, or serve without --enable-dwdp."
            )
    for backend, count in backends.items():
        logger.info("DWDP: %d MoE layers run %s experts with %s", count, backend.weights, backend.name)
        if not is_validated(backend, gpu_generation()):
            logger.warning(
                "DWDP: %s experts with %s have not been validated against a single rank on this kind of GPU yet",
                backend.weights,
                backend.name,
            )
    return [SglangLayer(layer) for layer in sorted(found, key=lambda layer: int(layer.layer_id))]


def install_shard_count() -> None:
    """Put `ShardCount` in place; SGLang's registry wraps functions only."""
    setattr(FusedMoE, _COUNT, ShardCount())


_PATH = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"
_CHECK = "sglang.srt.model_executor.model_runner.ModelRunner.check_quantized_moe_compatibility"
HOOKS = (
    Hook(_CHECK, HookType.REPLACE, check_blocks),
    Hook(f"{_PATH}.__init__", HookType.AROUND, build),
    Hook(f"{_PATH}._map_global_expert_id_to_local_expert_id", HookType.REPLACE, local_index),
    Hook(f"{_PATH}.forward_deferred_finalize", HookType.AROUND, deferred_finalize),
)
AUDIT_HOOKS = (Hook(f"{_PATH}.forward_impl", HookType.AROUND, count_reads),)
