"""Which MoE runner backend a server gets whose user left `--moe-runner-backend` at auto."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.arg_groups.model_override_base import model_config_of

from sglang_dwdp.support import flashinfer_modules
from sglang_dwdp.support.backends import HOPPER, WeightFormat, default_backend
from sglang_dwdp.support.gpu import gpu_generation

logger = logging.getLogger(__name__)


def weights_of(quantization: str | None, config: dict[str, Any] | None) -> WeightFormat | None:
    """The format of the experts; None: one that has no default here.

    Args:
        quantization: --quantization.
        config: the checkpoint's `quantization_config`.
    """
    config = config or {}
    method = quantization or config.get("quant_method")
    if method is None:
        return WeightFormat.BF16
    if method == "fp8" and list(config.get("weight_block_size") or ()) == [128, 128]:
        return WeightFormat.BLOCK_FP8
    return WeightFormat.MXFP4 if method == "mxfp4" else None


def quantization_config(model: Any) -> dict[str, Any]:
    """What config.json says of a checkpoint's weight format; empty: nothing.

    Args:
        model: SGLang's ModelConfig.
    """
    names = ("quantization_config", "compression_config")
    found = (getattr(model.hf_config, name, None) for name in names)
    return next((one for one in found if isinstance(one, dict)), {})


def choose(server_args: Any, view: Any) -> str | None:
    """The backend to declare; None: leave the choice to SGLang, because the user made it, or there is none here."""
    if view.device != "cuda" or view.moe_runner_backend != "auto" or gpu_generation() != HOPPER:
        return None
    model = model_config_of(server_args)
    weights = weights_of(view.quantization, quantization_config(model))
    gpt_oss = any(name.startswith("GptOss") for name in getattr(model.hf_config, "architectures", None) or ())
    chosen = (
        None if weights is None else default_backend(weights, gpt_oss=gpt_oss, has_kernels=flashinfer_modules.ready)
    )
    if chosen is None:
        logger.info("DWDP leaves the choice of --moe-runner-backend for these experts to SGLang")
        return None
    backend, reason = chosen
    logger.info("DWDP: --moe-runner-backend auto is %s for %s experts: %s", backend, weights, reason)
    return backend
