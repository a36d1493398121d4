"""The MoE layers of joint forwards, and what a rank without rows runs: those layers alone, one CUDA graph a bucket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.exchange.joint import JointForwards
from sglang_dwdp.exchange.policy import StepTimes
from sglang_dwdp.exchange.round import MAX_DECODE_ROWS
from sglang_dwdp.experts.direct_limit import in_place_over_copies
from sglang_dwdp.srt_patches.shard_run import JointLayer

logger = logging.getLogger(__name__)
_TIMED_REPLAYS = 8  # other processes that start may have the GPU or the cores meanwhile, and what is chosen stays
_TIMED_COPIES = 2  # some hundred milliseconds each
_FIRST = -100  # a priority: torch takes the highest that there is
# A guess of a forward's time over that of its MoE layers. Only how long a rank waits depends on it.
_WITH_ATTENTION = 1.5


def _reserved_bytes() -> int:
    """What torch holds of the GPU, without what it only keeps for later, which a capture would give back."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


class JointLayers:
    """The MoE layers of one rank, as joint forwards run them.

    Attributes:
        beside: The stream of a rank without rows, whose kernels go before those of its own forward; None on a CPU.
    """

    def __init__(self, forwards: JointForwards, layers: Mapping[int, JointLayer], shape: RowShape, device: str) -> None:
        """Layers of a rank.

        Args:
            forwards: Of this rank.
            layers: By layer id, in the order in which a forward runs them.
            shape: Of rows.
            device: "cuda" or "cpu".
        """
        self._forwards, self._layers, self._shape = forwards, layers, shape
        self._num_experts = max((len(layer.table) - 1 for layer in layers.values()), default=shape.top_k)
        on_gpu = device == "cuda"
        self.beside: Any = torch.cuda.Stream(priority=_FIRST) if on_gpu else None  # type: ignore[no-untyped-call]
        self._graphs: dict[int, Any] = {}  # by bucket: what a rank without rows replays
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._capture_s, self._capture_bytes = 0.0, 0
        self._alone_us: dict[int, float] = {}  # by bucket, as measured
        self._joint_us: dict[int, float] = {}
        self._copies_us: float | None = None
        # Rows of a graph's bucket that are a request's; the others are padding, and are sent nowhere.
        self._num_rows = torch.zeros(1, dtype=torch.int32, device=device)
        self._row_numbers = torch.arange(shape.max_bucket, dtype=torch.int32, device=device)[:, None]

    def __contains__(self, layer_id: int) -> bool:
        """Whether a layer's rows can travel."""
        return layer_id in self._layers

    def decode_size(self, rows: int) -> int:
        """The size of the graph in which a decode of so many rows is replayed; `rows` without graphs, and 0 with more
        rows than they have: peers with fewer could not take that size."""
        sizes = [size for size in self._graphs if size <= MAX_DECODE_ROWS]
        return min((size for size in sizes if size >= rows), default=0 if sizes else rows)

    def set_rows(self, rows: int) -> None:
        """The current stream is about to run a joint forward with so many own rows."""
        self._num_rows.fill_(rows)

    def run(self, layer_id: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
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
        layer = self._layers[layer_id]
        own = torch.where(self._row_numbers[: len(rows)] < self._num_rows, ids, -1).to(torch.int32)
        weights = weights.to(torch.float32).contiguous()
        return self._forwards.layer(layer_id, rows.contiguous(), own, weights, layer.experts, layer.table)

    def run_all(self, bucket: int) -> None:
        """All layers of a joint forward of this bucket, without own rows, on the current stream.

        Raises:
            DwdpRuntimeError: As `run`.
        """
        graph = self._graphs.get(bucket)
        if graph is None:  # forwards run without graphs
            self._run_padding(0)
        else:
            graph.replay()

    def _run_padding(self, num_rows: int) -> None:
        """All layers, with so many rows of padding."""
        shape, device = self._shape, self._num_rows.device
        rows = torch.zeros((num_rows, shape.hidden_size), dtype=shape.dtype, device=device)
        # Spread over the experts, since the time of a graph with all of its rows is measured.
        experts = self._num_experts
        first = 5 * torch.arange(num_rows, dtype=torch.int32, device=device)[:, None]
        ids = (first + experts // shape.top_k * torch.arange(shape.top_k, dtype=torch.int32, device=device)) % experts
        weights = torch.zeros((num_rows, shape.top_k), dtype=torch.float32, device=device)
        for layer_id in self._layers:
            self.run(layer_id, rows, ids, weights)

    @contextmanager
    def capture(self, bucket: int) -> Iterator[None]:
        """Warm-ups and the capture of a joint forward of this bucket, whose cost is counted; all ranks do it at the
        same time."""
        start, reserved = time.monotonic(), _reserved_bytes()
        self.set_rows(bucket)
        with self._forwards.capturing(bucket):
            yield
        self._capture_s += time.monotonic() - start
        self._capture_bytes += _reserved_bytes() - reserved

    def capture_help(self, bucket: int) -> None:
        """In `capture`: capture what a rank without rows replays in a joint forward of this bucket."""
        for _ in range(2):
            self._run_padding(bucket)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # One replay at a time, so their memory may be the same; other graphs' may be in use on another stream.
        with torch.cuda.graph(graph, pool=self._pool, stream=self.beside):
            self._run_padding(bucket)
        self._graphs[bucket] = graph

    def log_capture(self) -> None:
        """Log what was captured since the last call, if anything was."""
        if self._capture_s:
            size = self._capture_bytes / 2**20
            logger.info("DWDP: the graphs of exchange steps took %.1f s and %.0f MiB.", self._capture_s, size)
            self._capture_s, self._capture_bytes = 0.0, 0

    def time_decode(self, bucket: int, alone: Callable[[], Any], joint: Callable[[], Any]) -> None:
        """Time a bucket's two graphs, by which a rank decides how long to wait; all ranks do it at the same time.

        Args:
            bucket: Of both.
            alone: Replays the graph that reads experts in place.
            joint: Replays the joint one.
        """
        self.set_rows(bucket)
        # Joint first: its kernels make the ranks begin together, as they read from each other in the other.
        joint_us, alone_us = _replay_us(joint), _replay_us(alone)
        if self._copies_us is not None:
            # A capture's tokens may choose fewer experts than requests' do: by its times 24 lost 2.5 ms alone on two
            # H200, where 24 that were served took 20.
            share = in_place_over_copies(bucket, self._num_experts, self._shape.top_k)
            alone_us = max(alone_us, share * self._copies_us)
        self._set_times(bucket, alone_us, joint_us)

    def time_copies(self, copies: Callable[[], Any] | float) -> None:
        """Time once, in the first graph that is captured, what a forward waits for that is not joint; all ranks do it
        at the same time, so that they are in each other's way, as in prefills.

        Args:
            copies: Copies all experts that a forward needs; or the microseconds that they take.
        """
        if self._copies_us is None:
            self._copies_us = copies if isinstance(copies, float) else _replay_us(copies, _TIMED_COPIES)

    def time_prefill(self, bucket: int) -> None:
        """Time what a rank replays that helps with a prefill of this bucket; all ranks do it at the same time, after
        `time_copies`.

        A prefill's own graph is in pieces, with attention to the batch's sequences between them.
        """
        assert self._copies_us is not None
        self.set_rows(bucket)
        joint_us = _WITH_ATTENTION * _replay_us(self._graphs[bucket].replay)
        alone_us = self._copies_us
        self._set_times(bucket, alone_us, joint_us)
        if not self._forwards.times.is_joint(bucket):
            logger.info(
                "DWDP: this rank runs its prefills of %d tokens alone: together they would take %.1f ms of all ranks, "
                "and by copies %.1f ms of this one. If something else kept the GPU or its host busy just now, start "
                "the server again.",
                bucket,
                joint_us / 1000,
                alone_us / 1000,
            )

    def _set_times(self, bucket: int, alone_us: float, joint_us: float) -> None:
        self._alone_us[bucket], self._joint_us[bucket] = alone_us, joint_us
        self._forwards.times = StepTimes(sorted(self._alone_us.items()), sorted(self._joint_us.items()))
        logger.debug(
            "DWDP: a forward of %d takes %.0f us alone, %.0f us as an exchange step", bucket, alone_us, joint_us
        )


def _replay_us(replay: Callable[[], Any], times: int = _TIMED_REPLAYS) -> float:
    """Microseconds of a replay on the GPU: the shortest of some, after one that warms up.

    Ranks must replay equally often, so this is not a loop that fills a time.
    """
    replay()
    found: list[float] = []
    for _ in range(times):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        found.append(1000.0 * start.elapsed_time(stop))
    return min(found)
