"""What DWDP settled in the arguments has to be what a server starts with.

SGLang's resolution goes on after the step in which DWDP settles them, and later steps (for models, for all-to-all
backends) may settle the same arguments otherwise.
"""

from __future__ import annotations

from typing import Any

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.srt_patches.resolved import RESOLVED


def refuse_changes(view: Any) -> None:
    """Refuse arguments that a later step changed.

    view: resolved server arguments.

    Raises:
        DwdpConfigError: one has another value than DWDP needs.
    """
    changed = [
        f"{name} {getattr(view, name)!r} in place of {value!r}"
        for name, value in RESOLVED.items()
        if getattr(view, name) != value
    ]
    if changed:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: SGLang settled {', '.join(changed)} for this model or another option. "
            "Drop the option that asks for it, or serve without --enable-dwdp."
        )
