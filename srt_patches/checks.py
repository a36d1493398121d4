"""What a loaded model must not have, because DWDP would give wrong tokens, or wait for ranks that never come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.runtime_context import get_parallel

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.backends import MoeBackend, check_backend

_FORWARD = ("forward", "forward_impl", "run_moe_core")


def check_constructed(model: torch.nn.Module, *, is_draft: bool = False) -> None:
    """Check what can be seen of a model before its weights are read.

    Args:
        model: As SGLang has constructed it.
        is_draft: It drafts for another one, so it may have no experts.

    Raises:
        DwdpConfigError: It is unsupported.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedMoE)]
    if not layers and not is_draft:
        raise DwdpConfigError(
            f"{type(model).__name__} has no FusedMoE layer, so there are no experts to share. "
            "Serve it without --enable-dwdp."
        )
    check_not_sharded(model)
    check_heads(model, get_parallel().tp_size)
    if layers:
        check_layer_numbers(layers)
    for layer in layers:
        on_gpu = any(parameter.is_cuda for parameter in layer.parameters())
        check_own_forward(layer)
        if on_gpu:
            backend_of_layer(layer)
        elif type(layer.quant_method).__name__ != "UnquantizedFusedMoEMethod":
            raise DwdpConfigError(
                f"layer {layer.layer_id}: the CPU engine has no kernels for the experts of "
                f"{type(layer.quant_method).__name__} that need no AMX. Use a plain checkpoint, or GPUs."
            )
        elif layer.moe_runner_config.apply_router_weight_on_input:  # Llama 4
            raise DwdpConfigError(
                f"layer {layer.layer_id}: the CPU engine cannot weigh what experts read, as {type(model).__name__} "
                "wants it. Use GPUs."
            )
        if layer.num_fused_shared_experts:
            raise DwdpConfigError(
                f"layer {layer.layer_id} fuses shared experts into the routed ones. "
                "Add --disable-shared-experts-fusion."
            )


def check_not_sharded(model: torch.nn.Module) -> None:
    """Check that every rank has all of the model.

    Raises:
        DwdpConfigError: SGLang's code of this model shards it over all ranks even with attention data parallelism,
            so a rank could not run a request alone. Such models shard their embedding, which is easy to see.
    """
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and module.tp_size > 1:
            raise DwdpConfigError(
                f"SGLang shards {name} of {type(model).__name__} over {module.tp_size} ranks: it has no attention data "
                "parallelism for this model, which DWDP builds on. Serve it without --enable-dwdp."
            )


def check_heads(model: torch.nn.Module, ranks: int) -> None:
    """Check that every rank has all attention heads.

    Args:
        model: A constructed model, with the checkpoint's config.
        ranks: Ranks that a model would divide heads among.

    Raises:
        DwdpConfigError: SGLang's code of this model divides them, so a rank would compute a part of each token.
    """
    config = getattr(model, "config", None)
    heads = getattr(getattr(config, "text_config", config), "num_attention_heads", None)
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    # Models may have layers with fewer heads than the config says; all of them with just this part are divided ones.
    if heads and ranks > 1 and layers and all(layer.tp_q_head_num * ranks == heads for layer in layers):
        raise DwdpConfigError(
            f"SGLang divides the {heads} attention heads of {type(model).__name__} among {ranks} ranks: it has no "
            "attention data parallelism for this model, which DWDP builds on. Serve it without --enable-dwdp."
        )


def check_layer_numbers(layers: Sequence[Any]) -> None:
    """Check that the layers' numbers differ.

    Raises:
        DwdpConfigError: Two layers have one number, by which the runtime tells them apart.
    """
    number, count = Counter(layer.layer_id for layer in layers).most_common(1)[0]
    if count > 1:
        raise DwdpConfigError(
            f"{count} FusedMoE layers of this model have the number {number}, so DWDP could not tell them apart. "
            "Serve it without --enable-dwdp."
        )


def check_expert_state(layer: Any) -> None:
    """Check that all state of a loaded layer's experts is known.

    Raises:
        DwdpConfigError: The layer or its method keeps tensors for the experts that were loaded where neither
            SGLang's list of per-expert tensors nor `rebuild_state` finds them.
    """
    known = {"_cutlass_swiglu_params"}
    count = layer.num_local_experts
    for owner in {id(owner): owner for owner in (layer, layer.quant_method, scheme_of(layer))}.values():
        for name, value in vars(owner).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
            if isinstance(value, torch.Tensor) and owner is not layer:
                held = (value,)
            if name in known or name.startswith(("_parameters", "_buffers")):
                continue
            if any(isinstance(part, torch.Tensor) and part.ndim and part.shape[0] == count for part in held):
                raise DwdpConfigError(
                    f"layer {layer.layer_id}: {type(owner).__name__}.{name} holds something for each of the {count} "
                    "experts that were loaded, which DWDP does not know how to extend to all. Use another "
                    "--moe-runner-backend, or serve without --enable-dwdp."
                )


def check_own_forward(layer: Any) -> None:
    """Check that FusedMoE's own code runs the layer.

    Raises:
        DwdpConfigError: The model runs this layer by code of its own, which would not wait for the experts.
    """
    own = [name for name in _FORWARD if getattr(type(layer), name) is not getattr(FusedMoE, name)]
    if own:
        raise DwdpConfigError(
            f"layer {layer.layer_id}: {type(layer).__name__} replaces FusedMoE.{own[0]}, so it would read experts "
            "before they are there. Serve this model without --enable-dwdp."
        )


def scheme_of(layer: Any) -> Any:
    """What knows the weight format of a layer: its scheme, where SGLang's method hands everything on to one."""
    scheme = getattr(layer, "scheme", None)
    return layer.quant_method if scheme is None else scheme


def backend_of_layer(layer: Any) -> MoeBackend:
    """The MoE backend of a layer on a GPU.

    Raises:
        DwdpConfigError: It cannot read shared experts, or was not examined.
    """
    scheme = scheme_of(layer)
    kinds = {"use_mxfp8": "MXFP8", "is_fp4_expert": "FP4"}
    other = next((kind for name, kind in kinds.items() if getattr(scheme, name, False)), None)
    if other is not None:
        raise DwdpConfigError(
            f"layer {layer.layer_id}: {other} experts of SGLang's FP8 method were not examined. Use a checkpoint with "
            "FP8 experts, or serve without --enable-dwdp."
        )
    backend = getattr(layer.runner_backend, "value", None)
    in_blocks = bool(getattr(scheme, "block_quant", True))
    return check_backend(layer.layer_id, type(scheme).__name__, backend, in_blocks=in_blocks)
