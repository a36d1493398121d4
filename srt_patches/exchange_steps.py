"""Exchange steps of one scheduler: joint forwards and their CUDA graphs, and the part of a rank that has no rows.

A rank that is idle, or that waits for a prefill of its own, helps peers with a small forward: it replays the MoE layers
alone, on a stream whose kernels go before those of the prefill.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange.bells import Bells
from sglang_dwdp.exchange.inbox import RowShape
from sglang_dwdp.exchange.joint import JointForwards
from sglang_dwdp.exchange.policy import StepTimes
from sglang_dwdp.exchange.round import MAX_DECODE_ROWS
from sglang_dwdp.srt_patches.shard_run import JointLayer

logger = logging.getLogger(__name__)
_TIMED_REPLAYS = 3
_FIRST = -100  # a priority: torch takes the highest that there is
_NAP_S = 20e-6
_WITH_ATTENTION = 1.5  # of a forward's time over that of its MoE layers, about
_MAX_HELPS = 1  # that run beside the next: peers are ahead of their GPUs by one forward, too


class ExchangeSteps:
    """The exchange steps of one scheduler: what the hooks share.

    Attributes:
        forwards: Decides with the peers which forwards are joint.
        bells: By which peers wake this rank.
        bucket: Of the joint forward under way, or under capture; 0 outside of one.
    """

    def __init__(
        self,
        forwards: JointForwards,
        bells: Bells,
        layers: Mapping[int, JointLayer],
        shape: RowShape,
        device: str,
        prefill_buckets: Sequence[int] = (),
        staged_us: float = 0.0,
    ) -> None:
        """Steps of a rank.

        Args:
            forwards: Decides with the peers which forwards are joint.
            bells: By which peers wake this rank.
            layers: By layer id, in the order in which a forward runs them.
            shape: Of rows.
            device: "cuda" or "cpu".
            prefill_buckets: Sizes of joint prefills, rising; none without them. Those of CUDA graphs are captured.
            staged_us: What a staged prefill takes at least.
        """
        self.forwards, self.bells, self._layers, self._shape = forwards, bells, layers, shape
        self.prefill_buckets, self._staged_us = tuple(prefill_buckets), staged_us
        self._on_gpu = device == "cuda"
        self._graphs: dict[int, Any] = {}  # by bucket: what a rank without rows replays
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._capture_s, self._capture_bytes = 0.0, 0
        self._alone_us: dict[int, float] = {}  # by bucket, as measured
        self._joint_us: dict[int, float] = {}
        self._last_joint: Any = None  # event after the last joint forward
        # Rows of a graph's bucket that are a request's; the others are padding, and are sent nowhere.
        self._num_rows = torch.zeros(1, dtype=torch.int32, device=device)
        self._row_numbers = torch.arange(shape.max_bucket, dtype=torch.int32, device=device)[:, None]
        self._beside: Any = torch.cuda.Stream(priority=_FIRST) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._launch_s = 0.0  # of the last prefill: while it is launched, this rank helps nobody
        self._launch_start: float | None = None
        self._waits: deque[Callable[[], None]] = deque()  # of forwards whose results were not asked for yet
        self._helps: deque[Callable[[], None]] = deque()  # of joint forwards without own rows that may still run
        forwards.until = self._help_until

    @property
    def bucket(self) -> int:
        return self.forwards.bucket or 0

    def has_layer(self, layer_id: int) -> bool:
        """Whether a layer's rows can travel."""
        return layer_id in self._layers

    def bucket_of(self, rows: int, *, is_decode: bool = True) -> int:
        """The size of the graph that so many rows are replayed in, in a joint forward.

        Args:
            rows: Of a rank.
            is_decode: Whether they are of a decode, whose size without graphs is `rows`.

        Returns:
            0 if the forward cannot be joint.
        """
        if not is_decode:
            return min((size for size in self.prefill_buckets if size >= rows > 0), default=0)
        if rows > MAX_DECODE_ROWS:
            return 0
        return min((size for size in self._graphs if MAX_DECODE_ROWS >= size >= rows), default=rows)

    def begin(self, rows: int, *, is_decode: bool) -> bool:
        """A forward of `rows` rows is about to run.

        Returns:
            Whether it is joint.

        Raises:
            DwdpRuntimeError: A peer stopped in the middle of a change.
        """
        if self._capture_s:
            logger.info(
                "DWDP: the graphs of exchange steps took %.1f s and %.0f MiB.",
                *(self._capture_s, self._capture_bytes / 2**20),
            )
            self._capture_s = 0.0
        bucket = self.bucket_of(rows, is_decode=is_decode)
        while bucket and (joint := self.forwards.begin(bucket)):
            if joint.buckets[self.forwards.rank]:
                self._join(rows)
                return True
            self._end_helps(_MAX_HELPS)
            self._run_help()  # with a prefill of peers
        if not is_decode or not bucket:
            self._launch_start = time.monotonic()
            self.forwards.go_away(1e6 * self._launch_s)
        return False

    def end(self, *, is_joint: bool) -> None:
        """The forward has been launched on the current stream."""
        done: Any = None
        if self._on_gpu:
            done = _event()
            if is_joint:
                self._last_joint = done
            if self._launch_start is not None:
                self._launch_s = time.monotonic() - self._launch_start
        self._launch_start = None
        self._waits.append(self.forwards.end(done))

    def wait(self) -> None:
        """Wait for the oldest forward whose result was not asked for; help peers while it runs, if it is not joint.

        Raises:
            DwdpRuntimeError: A peer has left a joint forward; layer and peer are named.
        """
        if self._waits:
            self._waits.popleft()()

    def help_out(self) -> bool:
        """An idle rank: take part in a joint forward with no rows, if peers wait for one.

        Returns:
            Whether they did. If not, those before have ended.

        Raises:
            DwdpRuntimeError: As `begin` and `wait`.
        """
        if self._help():
            return True
        self._end_helps(0)
        return False

    def _help_until(self, done: Any) -> None:
        """Wait for a forward of this rank, and help peers meanwhile. That a peer leaves what it wanted help with makes
        this rank's own forward no worse."""
        try:
            while not done.query():
                if not self._help():
                    time.sleep(_NAP_S)
            self._end_helps(0)
        except DwdpRuntimeError as error:
            logger.warning("DWDP: this rank decodes alone from here on: %s", error)
            while self._helps:  # their kernels wait for the peer until they are told not to
                with suppress(DwdpRuntimeError):
                    self._helps.popleft()()
            done.synchronize()

    def _help(self) -> bool:
        self._end_helps(_MAX_HELPS)
        if self.forwards.begin(0) is None:
            return False
        self._run_help()
        return True

    def _run_help(self) -> None:
        """The MoE layers of the joint forward that has begun, without own rows."""
        with torch.cuda.stream(self._beside) if self._on_gpu else nullcontext():
            self._join(0)
            graph = self._graphs.get(self.bucket)
            if graph is None:  # decode runs without graphs
                self._run_layers(0)
            else:
                graph.replay()
            if self._on_gpu:
                self._last_joint = _event()
        self._helps.append(self.forwards.end(self._last_joint, helping=True))

    def _end_helps(self, left: int) -> None:
        while len(self._helps) > left:
            self._helps.popleft()()

    def _join(self, rows: int) -> None:
        """The current stream is about to run a joint forward with so many own rows."""
        if self._last_joint is not None:  # it may have been on the other stream
            torch.cuda.current_stream().wait_event(self._last_joint)
        self._num_rows.fill_(rows)

    @contextmanager
    def capture(self, bucket: int) -> Iterator[None]:
        """Warm-ups and the capture of a joint forward of this bucket; all ranks do it at the same time."""
        self._num_rows.fill_(bucket)
        with self.forwards.capturing(bucket):
            yield

    def capture_help(self, bucket: int) -> None:
        """In `capture`: capture what a rank without rows replays in a joint forward of this bucket."""
        for _ in range(2):
            self._run_layers(bucket)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # One replay at a time, so their memory may be the same; other graphs' may be in use on another stream.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._beside):
            self._run_layers(bucket)
        self._graphs[bucket] = graph

    def time_prefill(self, bucket: int) -> None:
        """Time what a rank replays that helps with a prefill of this bucket; all ranks do it at the same time.

        A prefill's own graph is in pieces, with attention to the batch's sequences between them.
        """
        self._num_rows.fill_(bucket)
        self._set_times(bucket, self._staged_us, _WITH_ATTENTION * _replay_us(self._graphs[bucket].replay))

    @contextmanager
    def weighed(self) -> Iterator[None]:
        """Count what is captured in here; the sums are logged before the first forward."""
        start, reserved = time.monotonic(), torch.cuda.memory_reserved()
        yield
        self._capture_s += time.monotonic() - start
        self._capture_bytes += torch.cuda.memory_reserved() - reserved

    def time(self, bucket: int, alone: Callable[[], Any], joint: Callable[[], Any]) -> None:
        """Time a bucket's two graphs, by which a rank decides how long to wait; all ranks do it at the same time.

        Args:
            bucket: Of both.
            alone: Replays the graph that reads experts in place.
            joint: Replays the joint one.
        """
        self._num_rows.fill_(bucket)
        # Joint first: its kernels make the ranks begin together, as they read from each other in the other.
        joint_us = _replay_us(joint)
        self._set_times(bucket, _replay_us(alone), joint_us)

    def _set_times(self, bucket: int, alone_us: float, joint_us: float) -> None:
        self._alone_us[bucket], self._joint_us[bucket] = alone_us, joint_us
        self.forwards.times = StepTimes(sorted(self._alone_us.items()), sorted(self._joint_us.items()))
        logger.debug(
            "DWDP: a forward of %d takes %.0f us alone, %.0f us as an exchange step",
            bucket,
            self._alone_us[bucket],
            self._joint_us[bucket],
        )

    def _run_layers(self, num_rows: int) -> None:
        """All MoE layers, with so many rows of padding."""
        if not self._layers:
            return
        shape, device = self._shape, self._num_rows.device
        rows = torch.zeros((num_rows, shape.hidden_size), dtype=shape.dtype, device=device)
        # Spread over the experts, since the time of a graph with all of its rows is measured.
        experts = max(len(layer.table) - 1 for layer in self._layers.values())
        first = 5 * torch.arange(num_rows, dtype=torch.int32, device=device)[:, None]
        ids = (first + experts // shape.top_k * torch.arange(shape.top_k, dtype=torch.int32, device=device)) % experts
        weights = torch.zeros((num_rows, shape.top_k), dtype=torch.float32, device=device)
        for layer_id in self._layers:
            self.run_layer(layer_id, rows, ids, weights)

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
        layer = self._layers[layer_id]
        own = torch.where(self._row_numbers[: len(rows)] < self._num_rows, ids, -1).to(torch.int32)
        weights = weights.to(torch.float32).contiguous()
        return self.forwards.layer(layer_id, rows.contiguous(), own, weights, layer.experts, layer.table)


def _event() -> Any:
    """A new event, recorded on the current stream.

    One for each forward: the next is launched, and recorded, before this one's result is asked for.
    """
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _replay_us(replay: Callable[[], Any]) -> float:
    """Microseconds of a replay on the GPU: the shortest of some, after one that warms up.

    Ranks must replay equally often, so this is not a loop that fills a time.
    """
    replay()
    times: list[float] = []
    for _ in range(_TIMED_REPLAYS):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        times.append(1000.0 * start.elapsed_time(stop))
    return min(times)
