"""Ranks in processes of their own, which import neither torch nor SGLang."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from sglang_dwdp.exchange.meeting import Meeting
from sglang_dwdp.exchange.page import Page, create
from sglang_dwdp.exchange.policy import StepTimes

PATIENT = StepTimes(alone=((1, 2e6),), joint=((1, 0.0),))  # waits for 2 s
HASTY = StepTimes(alone=((1, 300.0),), joint=((1, 0.0),))


def open_meeting(path: str, rank: int, size: int, times: StepTimes) -> Meeting:
    """This rank's meeting on the page at `path`."""
    fd = os.open(path, os.O_RDWR)
    try:
        return Meeting(Page(fd, rank, size), times)
    finally:
        os.close(fd)


def _main(work: Callable[..., Any], pipe: Connection, args: Sequence[Any]) -> None:
    pipe.send(work(pipe, *args))


@contextmanager
def ranks(work: Callable[..., Any], each: Sequence[Sequence[Any]]) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """Run `work(pipe, path, rank, *args)` in a process for each of the `args`; what it returns is sent last."""
    fd = create()
    context = multiprocessing.get_context("spawn")
    started = []
    try:
        for rank, args in enumerate(each):
            here, there = context.Pipe()
            path = f"/proc/{os.getpid()}/fd/{fd}"
            process = context.Process(target=_main, args=(work, there, (path, rank, *args)), daemon=True)
            process.start()
            there.close()
            started.append((process, here))
        yield started
    finally:
        for process, pipe in started:
            process.kill()
            process.join(10)
            pipe.close()
        os.close(fd)


def answer(pipe: Connection, seconds: float = 30) -> Any:
    """What a rank says next."""
    assert pipe.poll(seconds), "a rank did not answer"
    return pipe.recv()
