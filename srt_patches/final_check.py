"""What DWDP settled in the arguments has to be what a server starts with.

SGLang's resolution goes on after the step in which DWDP settles them, and later steps (for models, for all-to-all
backends) may settle the same arguments otherwise.
"""

from __future__ import annotations

from typing import Any

from sglang_dwdp.errors import DwdpConfigError

# By argument: the value without which ranks would wait for each other, or read the wrong experts.
NEEDED = {
    "dp_size": 1,
    "ep_size": 1,
    "moe_dp_size": 1,
    "moe_a2a_backend": "none",
    "enable_dp_lm_head": True,
    "enable_dp_attention_local_control_broadcast": True,
    "disable_shared_experts_fusion": True,
    "enforce_shared_experts_fusion": False,
}


def refuse_changes(view: Any) -> None:
    """Refuse arguments that a later step changed.

    view: resolved server arguments.

    Raises:
        DwdpConfigError: one has another value than DWDP needs.
    """
    changed = [
        f"{name} {getattr(view, name)!r} in place of {value!r}"
        for name, value in NEEDED.items()
        if getattr(view, name) != value
    ]
    if changed:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: SGLang settled {', '.join(changed)} for this model or another option. "
            "Drop the option that asks for it, or serve without --enable-dwdp."
        )
