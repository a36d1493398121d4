"""Which CUDA graphs a server with DWDP captures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from sglang_dwdp.errors import DwdpConfigError

logger = logging.getLogger(__name__)
_OFF = (None, "disabled")
_BREAKABLE = "breakable"


def requested_backend(view: Any, phase: str) -> str | None:
    """The graph backend that the user asked for in a phase; None where SGLang chooses.

    Args:
        view: server arguments that were not resolved yet.
        phase: "decode" or "prefill".
    """
    found = _explicit(view).get(phase, {}).get("backend") or getattr(view, f"cuda_graph_backend_{phase}")
    return None if found is None else str(getattr(found, "value", found))


def check_graph_backends(view: Any) -> None:
    """Check the prefill graphs that were asked for.

    Args:
        view: server arguments that were not resolved yet.

    Raises:
        DwdpConfigError: they have no breaks, or other ones, where experts could be waited for.
    """
    backend = requested_backend(view, "prefill")
    if view.device != "cpu" and backend not in (*_OFF, _BREAKABLE):
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: --cuda-graph-backend-prefill {backend} is unsupported, since a "
            "prefill waits for its experts between the segments of a breakable graph. Use "
            f"--cuda-graph-backend-prefill {_BREAKABLE} (the default) or disabled."
        )


def graph_arguments(view: Any, *, has_direct: bool) -> dict[str, Any]:
    """Server arguments that turn off the CUDA graphs that cannot be captured.

    A decode graph is one piece, which reads experts in place: it needs direct views. Prefill graphs have breaks, so
    they are captured over either kind of view. The CPU engine has no CUDA graphs.

    Args:
        view: server arguments that were not resolved yet.
        has_direct: whether the server has direct views.
    """
    if view.device == "cpu":
        return {"disable_cuda_graph": True, **_turned_off(view, ("decode", "prefill"))}
    if has_direct:
        return {}
    logger.info("DWDP: CUDA graphs of decode are off: they need experts that can be read in place.")
    return _turned_off(view, ("decode",))


def _explicit(view: Any) -> dict[str, Any]:
    config = view.cuda_graph_config or {}
    found: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    return found


def _turned_off(view: Any, phases: Sequence[str]) -> dict[str, Any]:
    """SGLang lets --cuda-graph-backend-decode and --cuda-graph-backend-prefill win over --disable-cuda-graph, and
    --cuda-graph-config over both, so all of them are set."""
    result: dict[str, Any] = {}
    for phase in phases:
        wanted = requested_backend(view, phase)
        if wanted not in _OFF:
            logger.warning("DWDP: CUDA graphs of %s stay off: %r was asked for.", phase, wanted)
        result[f"cuda_graph_backend_{phase}"] = "disabled"
    explicit = _explicit(view)
    if explicit:
        off = {phase: {**explicit[phase], "backend": "disabled"} for phase in phases if phase in explicit}
        result["cuda_graph_config"] = {**explicit, **off}
    return result
