"""Exchange steps of one scheduler: which of its forwards are joint, and its part in joint forwards of others.

A rank that is idle, or that prepares a long prefill of its own, launches it or waits for it, helps peers with a small
forward: it runs the MoE layers alone (`joint_layers.py`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange.bells import Bells
from sglang_dwdp.exchange.joint import JointForwards
from sglang_dwdp.exchange.round import MAX_DECODE_ROWS
from sglang_dwdp.srt_patches.joint_layers import JointLayers

logger = logging.getLogger(__name__)
_NAP_S = 20e-6
_MAX_PREFILLS = 8  # of peers, one after the other, that a decode waits for; then it is run alone
_MAX_HELPS = 1  # that run beside the next: peers are ahead of their GPUs by one forward, too


class ExchangeSteps:
    """The exchange steps of one scheduler: what the hooks share.

    Attributes:
        forwards: Decides with the peers which forwards are joint.
        bells: By which peers wake this rank.
        layers: What joint forwards run.
        prefill_buckets: Sizes of joint prefills, rising; none where prefills are never joint.
        bucket: Of the joint forward under way, or under capture; 0 outside of one.
        housekeeping_at: When an idle rank lets SGLang do what it does in one, though it helps (`time.monotonic`).
    """

    def __init__(
        self, forwards: JointForwards, bells: Bells, layers: JointLayers, prefill_buckets: Sequence[int] = ()
    ) -> None:
        """Steps of a rank."""
        self.forwards, self.bells, self.layers = forwards, bells, layers
        self.prefill_buckets = tuple(prefill_buckets)
        self.housekeeping_at = 0.0
        self._last_joint: Any = None  # event after the last joint forward
        # While a piece of a prefill is launched, this rank helps nobody: seconds of the longest piece of the last one.
        self._launch_s = 0.0
        self._longest_s = 0.0  # so far, of the one that is being launched
        self._piece_start: float | None = None  # None: none is launched
        self._waits: deque[Callable[[], None]] = deque()  # of forwards whose results were not asked for yet
        # Of joint forwards without own rows that may still run: what ends them, and an event after each.
        self._helps: deque[tuple[Callable[[], None], Any]] = deque()
        forwards.until = self._help_until

    @property
    def bucket(self) -> int:
        return self.forwards.bucket or 0

    def bucket_of(self, rows: int, *, is_decode: bool = True) -> int:
        """The size of the graph that so many rows are replayed in, in a joint forward.

        Args:
            rows: Of a rank.
            is_decode: Whether they are of a decode, whose size without graphs is `rows`.

        Returns:
            0 if the forward cannot be joint, or is a prefill that is hardly slower alone: it would be joint whenever
            peers wait for something else.
        """
        if not is_decode:
            size = min((size for size in self.prefill_buckets if size >= rows > 0), default=0)
            return size if size and self.forwards.times.is_joint(size) else 0
        if rows > MAX_DECODE_ROWS:
            return 0
        return self.layers.decode_size(rows)

    def begin(self, rows: int, *, is_decode: bool) -> bool:
        """A forward of `rows` rows is about to run.

        Returns:
            Whether it is joint.

        Raises:
            DwdpRuntimeError: A peer stopped in the middle of a change.
        """
        self.layers.log_capture()
        bucket = self.bucket_of(rows, is_decode=is_decode)
        for _ in range(_MAX_PREFILLS if bucket else 0):
            joint = self.forwards.begin(bucket, None if is_decode else rows)
            if joint is None:
                break
            if joint.buckets[self.forwards.rank]:
                self._join(rows)
                return True
            self._end_helps(_MAX_HELPS)
            self._run_help()  # with a prefill of peers
        if not is_decode or not bucket:
            self.while_scheduling(is_prefill_next=True)
            self._piece_start, self._longest_s = None if is_decode else time.monotonic(), 0.0
            self.forwards.go_away(1e6 * self._launch_s)
        return False

    def end(self, *, is_joint: bool) -> None:
        """The forward has been launched on the current stream."""
        done: Any = None
        if self.layers.beside is not None:
            done = _event()
            if is_joint:
                self._last_joint = done
            if self._piece_start is not None:
                self._end_piece()
                self._launch_s = self._longest_s
        self._piece_start = None
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

    def between_pieces(self) -> None:
        """A piece of a prefill has been launched, and others follow: help peers that wait for this rank."""
        if self._piece_start is not None:
            self._end_piece()
        self._help_now()

    def before_replay(self) -> None:
        """A graph is about to be launched, maybe of a prefill that this rank runs alone: its first piece is ready."""
        if self._piece_start is not None:
            self.between_pieces()

    def while_scheduling(self, *, is_prefill_next: bool = False) -> None:
        """The scheduler has work before its next forward, some of it for milliseconds: help peers that wait.

        Not if a decode may be next that need not wait for this rank's GPU: it would miss the round of its peers.

        Args:
            is_prefill_next: A forward is next that is not joint, as a long prefill.
        """
        if self.layers.beside is not None and (is_prefill_next or self.forwards.is_behind()):
            self._help_now()

    def _help_now(self) -> None:
        """Help peers that wait; never wait, neither for a GPU nor for a third rank."""
        try:
            while self._helps and (self._helps[0][1] is None or self._helps[0][1].query()):
                self._end_helps(len(self._helps) - 1)
            if len(self._helps) <= _MAX_HELPS:
                self._help(wait=False)
        except DwdpRuntimeError as error:
            self._help_no_more(error)

    def _end_piece(self) -> None:
        assert self._piece_start is not None
        now = time.monotonic()
        self._longest_s, self._piece_start = max(self._longest_s, now - self._piece_start), now

    def _help_until(self, done: Any) -> None:
        """Wait for a forward of this rank, and help peers meanwhile. That a peer leaves what it wanted help with makes
        this rank's own forward no worse."""
        try:
            while not done.query():
                if not self._help():
                    time.sleep(_NAP_S)
            self._end_helps(0)
        except DwdpRuntimeError as error:
            self._help_no_more(error)
            done.synchronize()

    def _help_no_more(self, error: DwdpRuntimeError) -> None:
        logger.warning("DWDP: this rank decodes alone from here on: %s", error)
        while self._helps:  # their kernels wait for the peer until they are told not to
            with suppress(DwdpRuntimeError):
                self._helps.popleft()[0]()

    def _help(self, *, wait: bool = True) -> bool:
        self._end_helps(_MAX_HELPS)
        if self.forwards.begin(0, wait=wait) is None:
            return False
        self._run_help()
        return True

    def _run_help(self) -> None:
        """The MoE layers of the joint forward that has begun, without own rows."""
        beside = self.layers.beside
        with nullcontext() if beside is None else torch.cuda.stream(beside):
            self._join(0)
            self.layers.run_all(self.bucket)
            if beside is not None:
                self._last_joint = _event()
        self._helps.append((self.forwards.end(self._last_joint, helping=True), self._last_joint))

    def _end_helps(self, left: int) -> None:
        while len(self._helps) > left:
            self._helps.popleft()[0]()

    def _join(self, rows: int) -> None:
        """The current stream is about to run a joint forward with so many own rows."""
        if self._last_joint is not None:  # it may have been on the other stream
            torch.cuda.current_stream().wait_event(self._last_joint)
        self.layers.set_rows(rows)


def _event() -> Any:
    """A new event, recorded on the current stream.

    One for each forward: the next is launched, and recorded, before this one's result is asked for.
    """
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
