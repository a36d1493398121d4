"""The options of DWDP, attached to SGLang's server arguments.

They are no field of ServerArgs; SGLang carries such attributes to child processes.
"""

from __future__ import annotations

from typing import Any

from sglang_dwdp.config import DwdpConfig

_ATTRIBUTE = "_dwdp"


def config_of(server_args: Any) -> DwdpConfig | None:
    """The options attached to these server arguments; None where DWDP is off."""
    found: DwdpConfig | None = getattr(server_args, _ATTRIBUTE, None)
    return found


def attach_config(server_args: Any, config: DwdpConfig) -> None:
    """Attach options, in place of those that are attached."""
    setattr(server_args, _ATTRIBUTE, config)
