"""How rows travel in a joint MoE layer: what every transport offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a row consists of, and how many there may be; the same on all ranks.

    Attributes:
        max_bucket: Most rows that a rank sends in a layer.
        hidden_size: Elements of a row.
        top_k: Experts that a row is routed to.
        dtype: Of rows and of partial sums.
    """

    max_bucket: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype


class Received(NamedTuple):
    """Rows of all ranks, `bucket` places for each, in rank order. A row may lie anywhere among its rank's places.

    Attributes:
        rows: `[size * bucket, hidden_size]`; anything in places that hold no row for this rank.
        ids: `[size * bucket, top_k]`, int32, of all experts of the model; -1 in places that hold no row.
        weights: `[size * bucket, top_k]`, float32.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Inbox(Protocol):
    """One rank's rows on their way. All ranks call `dispatch`, then `combine`, for the same layers in one order.

    After an error it must not be used any more: ranks no longer agree on which layer is next.
    """

    def dispatch(
        self, layer_id: int, bucket: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Received:
        """Send rows to the ranks that store one of their experts, and receive those of all ranks.

        Args:
            layer_id: Names the layer in errors.
            bucket: Of the joint round: the largest number of rows of any rank.
            rows: `[n, hidden_size]`, with 0 <= n <= bucket.
            ids: `[n, top_k]`, int32; -1 for an expert that is not used, or throughout in a row of padding.
            weights: `[n, top_k]`, float32.

        Returns:
            What the ranks sent; valid until `combine` is called.

        Raises:
            DwdpRuntimeError: A peer sent nothing within the limit, or ended; it is named, and so is the layer. (Where
                the GPU waits, `wait` raises it.)
        """
        ...

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        """Send partial sums back to the ranks whose rows they belong to, and add those of this rank's own rows.

        Args:
            partial: `[size * bucket, hidden_size]`, for the places of `Received`. Places that hold no row may hold
                anything.

        Returns:
            `[n, hidden_size]`: sums over all ranks, added in float32.

        Raises:
            DwdpRuntimeError: As `dispatch`.
        """
        ...

    def wait(self, done: Any, limit_s: float) -> None:
        """Wait for a joint forward on a GPU; call this before its result is asked for. Nothing to do on the host.

        Args:
            done: A `torch.cuda.Event`, recorded after the forward.
            limit_s: Seconds after which peers that have sent nothing are given up.

        Raises:
            DwdpRuntimeError: A peer ended or did not come; named with the layer. The forward's result is void.
        """
        ...

    def close(self) -> None:
        """Free the memory that rows travel through. Idempotent."""
        ...
