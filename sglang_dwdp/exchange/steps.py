"""A rank's exchange steps: which of its small forwards are joint, and how a MoE layer runs in one of those.

A joint forward's layers send rows where their experts are stored (`layer.py`). A rank with no rows of its own takes
part without running the model: it computes the layers' partial sums only (`help_out`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sglang_dwdp.exchange.inbox import Inbox
from sglang_dwdp.exchange.layer import Experts, run_joint
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.round import Joint


@dataclass(frozen=True, slots=True)
class JointExperts:
    """What a MoE layer computes in a joint forward.

    Attributes:
        experts: Partial sums with the experts that this rank stores.
        table: `shard_table` of those experts.
    """

    experts: Experts
    table: torch.Tensor


class ExchangeSteps:
    """One rank's exchange steps. Owns its side of the rounds and of the rows' way.

    Args:
        meeting: Decides with the peers which forwards are joint.
        inbox: What rows travel by.
        layers: By layer id, in the order in which a forward runs them.
        max_rows: The largest bucket of a joint forward.
        bucket_of: The smallest bucket that takes so many rows: a CUDA graph's size, or the rows themselves.
    """

    def __init__(
        self,
        meeting: Meeting,
        inbox: Inbox,
        layers: Mapping[int, JointExperts],
        max_rows: int,
        bucket_of: Callable[[int], int] = lambda rows: rows,
    ) -> None:
        self.meeting = meeting
        self.inbox = inbox
        self.max_rows = max_rows
        self.bucket_of = bucket_of
        self._layers = layers
        self._bucket = 0
        device = next(iter(layers.values())).table.device
        # Rows of a graph's bucket that are a request's; the others are padding, and are sent nowhere.
        self._num_rows = torch.zeros(1, dtype=torch.int32, device=device)
        self._row_numbers = torch.arange(max_rows, dtype=torch.int32, device=device)[:, None]

    @property
    def bucket(self) -> int:
        """The bucket of the joint forward under way, or under capture; 0 outside of one."""
        return self._bucket

    def begin(self, rows: int) -> bool:
        """A forward of `rows` rows is about to run.

        Returns:
            Whether it is joint. `bucket` says how large, and `end` must follow.

        Raises:
            DwdpRuntimeError: A peer is stopped in the middle of a change.
        """
        if rows > self.max_rows:
            self.meeting.go_away(self.meeting.times.alone_us(rows))
            return False
        return self._start(self.meeting.meet(self.bucket_of(rows)), rows)

    def begin_help(self) -> bool:
        """This rank has nothing to run.

        Returns:
            Whether peers run a joint forward that it has to take part in, with no rows; as `begin`.

        Raises:
            DwdpRuntimeError: As `begin`.
        """
        return self._start(self.meeting.help(), 0)

    def _start(self, joint: Joint | None, rows: int) -> bool:
        if joint is None:
            return False
        self._bucket = joint.bucket
        self._num_rows.fill_(rows)
        return True

    def end(self) -> None:
        """The joint forward has been launched. Idempotent."""
        self._bucket = 0

    @contextmanager
    def capture(self, bucket: int) -> Iterator[None]:
        """Warm-ups and the capture of a joint forward of this bucket; all ranks do it at the same time."""
        self._bucket = bucket
        self._num_rows.fill_(bucket)
        try:
            yield
        finally:
            self._bucket = 0

    def has_layer(self, layer_id: int) -> bool:
        """Whether a layer's rows can travel."""
        return layer_id in self._layers

    def run_layer(self, layer_id: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One MoE layer of the joint forward under way.

        Args:
            layer_id: Which one.
            rows: `[n, hidden_size]`, padding included.
            ids: `[n, top_k]`, of all experts of the model.
            weights: `[n, top_k]`.

        Returns:
            `[n, hidden_size]`.

        Raises:
            DwdpRuntimeError: A peer took no part; see `Inbox.dispatch`.
        """
        ids = torch.where(self._row_numbers[: len(rows)] < self._num_rows, ids, -1).to(torch.int32)
        layer = self._layers[layer_id]
        return run_joint(
            self.inbox,
            layer_id,
            self._bucket,
            rows.contiguous(),
            ids,
            weights.to(torch.float32).contiguous(),
            layer.experts,
            layer.table,
        )

    def help_out(self, hidden_size: int, top_k: int, dtype: torch.dtype, *, padded: bool) -> None:
        """All MoE layers of the joint forward under way, with no rows of this rank's.

        Args:
            hidden_size: Of a row.
            top_k: Experts of a row.
            dtype: Of rows.
            padded: Send a bucket of padding, as a CUDA graph's rows have one size; otherwise nothing.
        """
        device = self._num_rows.device
        count = self._bucket if padded else 0
        rows = torch.zeros((count, hidden_size), dtype=dtype, device=device)
        ids = torch.zeros((count, top_k), dtype=torch.int32, device=device)
        weights = torch.zeros((count, top_k), dtype=torch.float32, device=device)
        for layer_id in self._layers:
            self.run_layer(layer_id, rows, ids, weights)

    def report(self) -> dict[str, int]:
        """Counters for /server_info."""
        return self.meeting.counters.as_dict()

    def close(self) -> None:
        """Leave for good; peers go on alone. Idempotent."""
        self.meeting.close()
        self.inbox.close()
