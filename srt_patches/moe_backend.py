"""Which MoE runner backend a server gets whose user left `--moe-runner-backend` at auto."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import model_config_of

from sglang_dwdp.support import flashinfer_modules
from sglang_dwdp.support.backends import GPT_OSS_BF16, default_for

logger = logging.getLogger(__name__)


def weights_of(quantization: str | None, config: dict[str, Any] | None) -> str | None:
    """The format of the experts, in the words of `backends.WAYS`; None: another one.

    quantization: --quantization.  config: the checkpoint's `quantization_config`.
    """
    config = config or {}
    method = quantization or config.get("quant_method")
    if method is None:
        return "bf16"
    if method == "fp8" and list(config.get("weight_block_size") or ()) == [128, 128]:
        return "block-FP8"
    return "MXFP4" if method == "mxfp4" else None


def choose(server_args: Any, view: Any) -> str | None:
    """The backend to declare; None: leave the choice to SGLang, because the user made it, or there is none here."""
    if view.device != "cuda" or view.moe_runner_backend != "auto" or torch.cuda.get_device_capability()[0] != 9:
        return None
    model = model_config_of(server_args).hf_config
    described = getattr(model, "quantization_config", None)
    weights = weights_of(view.quantization, described if isinstance(described, dict) else None)
    if weights == "bf16" and any(name.startswith("GptOss") for name in getattr(model, "architectures", None) or ()):
        weights = GPT_OSS_BF16
    chosen = None if weights is None else default_for(weights, has_kernels)
    if chosen is None:
        logger.info("DWDP leaves the choice of --moe-runner-backend for these experts to SGLang")
        return None
    logger.info("DWDP: --moe-runner-backend auto is %s for %s experts: %s", chosen.backend, weights, chosen.reason)
    return chosen.backend


def has_kernels(weight_format: str) -> bool:
    """Whether FlashInfer can run this format (a key of `flashinfer_modules.FORMATS`) without a long build."""
    return flashinfer_modules.ready(weight_format)
