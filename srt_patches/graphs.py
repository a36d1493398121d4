"""Which CUDA graphs a server with DWDP may capture."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def graphs_off(view: Any, phases: tuple[str, ...]) -> dict[str, Any]:
    """Server arguments that turn the CUDA graphs of these phases off, whatever else was asked for.

    SGLang lets --cuda-graph-backend-decode and --cuda-graph-backend-prefill win over --disable-cuda-graph, and
    --cuda-graph-config over both, so all of them are resolved.

    Args:
        view: server arguments that were not resolved yet.
        phases: of "decode" and "prefill".
    """
    explicit = view.cuda_graph_config or {}
    if not isinstance(explicit, dict):
        explicit = explicit.to_dict()
    result: dict[str, Any] = {}
    for phase in phases:
        wanted = explicit.get(phase, {}).get("backend") or getattr(view, f"cuda_graph_backend_{phase}")
        if wanted not in (None, "disabled"):
            logger.warning("DWDP: CUDA graphs of %s stay off: %r was asked for.", phase, wanted)
        result[f"cuda_graph_backend_{phase}"] = "disabled"
    if explicit:
        off = {phase: {**explicit[phase], "backend": "disabled"} for phase in phases if phase in explicit}
        result["cuda_graph_config"] = {**explicit, **off}
    return result
