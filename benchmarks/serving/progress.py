"""What a comparison shows while it runs: a bar on a terminal, a line for each step everywhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Display:
    """A progress bar over all runs; the context manager shows and removes it."""

    def __init__(self, console: Console, runs: int) -> None:
        self.console = console
        columns = (
            SpinnerColumn(),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=runs)
        self._lap = time.monotonic()

    def doing(self, text: str) -> None:
        """What is going on now."""
        self._progress.update(self._task, description=text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False)

    def advance(self, runs: int) -> None:
        """So many more runs are settled."""
        self._progress.advance(self._task, runs)

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        seconds, self._lap = now - self._lap, now
        return seconds

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()
