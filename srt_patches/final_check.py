"""What DWDP decided in the server arguments has to be what a server starts with.

SGLang's resolution goes on after the step in which DWDP decides, and later steps (for models, for all-to-all backends)
may decide the same arguments otherwise, or turn on what DWDP does not support.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support.conflicts import check_conflicts

# Values of DWDP's own that nothing depends on: what fits a rank best where the user chose nothing.
PREFERENCES = frozenset(
    {
        "attention_backend",
        "chunked_prefill_size",
        "disable_custom_all_reduce",
        "load_balance_method",
        "max_total_tokens",
        "moe_runner_backend",  # each layer's is checked when the model is there
        "schedule_conservativeness",
        "sleep_on_idle",
    }
)
_COMPLETED = frozenset({"cuda_graph_config"})  # SGLang fills in what was not declared


def declared_by(server_args: Any, source: str) -> dict[str, Any]:
    """The arguments that a source has declared, with the last value of each, from SGLang's own record."""
    declared: dict[str, Any] = {}
    for declarer, fields in server_args._resolved_overrides:
        if declarer == source:
            declared |= fields
    return declared


def check_resolved(view: Any, declared: Mapping[str, Any]) -> None:
    """Check arguments after the last step of their resolution.

    Args:
        view: Resolved server arguments.
        declared: What DWDP declared, by argument.

    Raises:
        DwdpConfigError: One that DWDP needs has another value, or one has a value that DWDP does not support.
    """
    changed = [
        f"{name} {getattr(view, name)!r} in place of {value!r}"
        for name, value in declared.items()
        if name not in PREFERENCES | _COMPLETED and getattr(view, name) != value
    ]
    if changed:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: SGLang chose {', '.join(changed)} for this model or another option. "
            "Drop the option that asks for it, or serve without --enable-dwdp."
        )
    check_conflicts(view, decided=set(declared) - PREFERENCES)
