"""One rank's joint forwards: from meeting its peers to the result, or to the error that ends joint forwards."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from sglang_dwdp.errors import DwdpRuntimeError
from sglang_dwdp.exchange.inbox import Inbox
from sglang_dwdp.exchange.layer import Experts, run_joint
from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.policy import StepTimes
from sglang_dwdp.exchange.round import Joint


class JointForwards:
    """What the engine calls around its forwards, and in MoE layers of joint ones. Owns the meeting and the inbox.

    Attributes:
        rank: Of this process in its group.
        bucket: Of the joint forward that runs, or is captured; None in one that the rank runs alone.
        until: Waits for the event of a forward that the rank runs alone. It may help peers meanwhile.
    """

    def __init__(self, meeting: Meeting, inbox: Inbox, limit_s: float) -> None:
        """Run joint forwards.

        Args:
            meeting: This rank's.
            inbox: What rows travel by.
            limit_s: Seconds that a joint forward waits for a peer on a GPU.
        """
        self.bucket: int | None = None
        self.rank = meeting.page.rank
        self.until: Callable[[Any], None] = lambda done: done.synchronize()
        self._meeting = meeting
        self._inbox = inbox
        self._limit_s = limit_s
        self._alone: Any = None  # event after the last own forward, if that was not joint

    def begin(self, bucket: int, rows: int | None = None, *, wait: bool = True) -> Joint | None:
        """A forward is about to run.

        A small one first waits until the GPU has run the one before, unless that was joint too: the host is ahead of
        the GPU, and peers that are joined with this rank would wait in their kernels. Where that may save nothing, it
        runs alone behind the one before.

        Args:
            bucket: Its rows, as the CUDA graph takes them. 0 to look whether peers wait, in a rank that is idle or
                waits for a forward of its own.
            rows: As in `StepTimes.alone_us`.
            wait: As in `Meeting.help`; of a rank that comes with 0.

        Returns:
            The joint round to run; None: run alone, or go on waiting. If this rank has no rows in the round, though
            it came with some, it helps peers with a prefill, and begins again.

        Raises:
            DwdpRuntimeError: A peer is stopped while it holds the page.
        """
        if bucket:
            if self.is_behind():
                if not self._meeting.times.may_save(bucket, rows):
                    self._meeting.counters.alone_rounds += 1
                    self.bucket = None
                    return None
                self.until(self._alone)
            joint = self._meeting.meet(bucket, rows)
        else:
            joint = self._meeting.help(wait=wait)
        self.bucket = joint.bucket if joint else None
        return joint

    def is_behind(self) -> bool:
        """Whether the GPU has not yet run this rank's last forward, which was not joint."""
        return self._alone is not None and not self._alone.query()

    def go_away(self, away_us: float) -> None:
        """A forward is about to be launched that takes so many microseconds of it, and is not joint.

        Raises:
            DwdpRuntimeError: As `begin`.
        """
        self._meeting.go_away(away_us)

    @contextmanager
    def apart(self) -> Generator[None]:
        """What is decided in here is decided as in a forward that is not joint."""
        bucket, self.bucket = self.bucket, None
        try:
            yield
        finally:
            self.bucket = bucket

    @property
    def times(self) -> StepTimes:
        """How long small forwards take, by which this rank decides how long it waits."""
        return self._meeting.times

    @times.setter
    def times(self, times: StepTimes) -> None:
        self._meeting.times = times

    @contextmanager
    def capturing(self, bucket: int) -> Generator[None]:
        """Forwards in here are joint ones of `bucket` rows, without a round: all ranks capture the same graphs."""
        self.bucket = bucket
        try:
            yield
        finally:
            self.bucket = None

    def layer(
        self,
        layer_id: int,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: Experts,
        table: torch.Tensor,
    ) -> torch.Tensor:
        """A MoE layer of the joint forward that runs, or is captured; see `run_joint`.

        Raises:
            DwdpRuntimeError: A peer took no part. Joint forwards have ended, on all ranks.
        """
        assert self.bucket is not None
        try:
            return run_joint(self._inbox, layer_id, self.bucket, rows, ids, weights, experts, table)
        except DwdpRuntimeError:
            self._meeting.end()
            raise

    def end(self, done: Any = None, *, helping: bool = False) -> Callable[[], None]:
        """The forward that `begin` announced has been launched; returns at once.

        Args:
            done: On a GPU, a `torch.cuda.Event` recorded after the forward.
            helping: It was begun with no rows, so that one of this rank may be under way.

        Returns:
            What to call before the result is asked for: it waits for that. After a joint forward on a GPU it raises
            DwdpRuntimeError if a peer took no part; joint forwards have then ended, on all ranks.
        """
        joint, self.bucket = self.bucket is not None, None
        if not helping:
            self._alone = None if joint else done

        def wait() -> None:
            if done is None:
                return
            if not joint:
                self.until(done)
                return
            try:
                self._inbox.wait(done, self._limit_s)
            except DwdpRuntimeError:
                self._meeting.end()
                raise

        return wait

    def report(self) -> dict[str, int | bool]:
        """Plain numbers for /server_info."""
        return {**self._meeting.counters.as_dict(), "joint_rounds_ended": self._meeting.ended}

    def close(self) -> None:
        """Leave the group's rounds, then free what rows travel through. Idempotent."""
        self._meeting.close()
        self._inbox.close()
