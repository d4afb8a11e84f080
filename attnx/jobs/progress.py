"""Progress of a job: a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

__all__ = ["Log", "Progress", "duration", "progress_bar"]

Progress: TypeAlias = Callable[[int, int], None]


class Log:
    """Lines that say how far a job is, for the log of a run without a terminal; a context manager.

    Args:
        unit: what is counted.
        every: seconds between lines; None: no lines are said.
        say: gets the lines.
    """

    def __init__(self, unit: str, every: float | None, say: Callable[[str], None]) -> None:
        self.unit, self.every, self._say = unit, every, say
        self._start = time.monotonic()
        self._before: int | None = None
        self.done = self.total = self.errors = 0
        self._ended = threading.Event()

    def __enter__(self) -> Log:
        if self.every is not None:
            threading.Thread(target=self._tell, args=(self.every,), name="attnx-log", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def progress(self, done: int, total: int) -> None:
        """Rows that are done and planned."""
        # What an earlier run did is no part of this one's rate.
        self._before = done if self._before is None else self._before
        self.done, self.total = done, total

    def line(self) -> str:
        """Counts of rows done and planned, images/s, the time left, and the count of this run's errors."""
        done, total, unit = self.done, self.total, self.unit
        rate = (done - (self._before or 0)) / max(time.monotonic() - self._start, 1e-9)
        left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
        wrong = f", {self.errors:,} errors" if self.errors else ""
        return f"{done:,} of {total:,} {unit} ({100 * done / max(total, 1):.0f} %), {rate:.1f} {unit}/s{left}{wrong}"

    def _tell(self, every: float) -> None:
        while not self._ended.wait(every):
            self._say(self.line() if self.total else "listing the source")


@contextlib.contextmanager
def progress_bar(total: int, unit: str = "images") -> Iterator[Progress]:
    """A `progress` for a job that draws a bar with images/s and the time left to stderr.

    Args:
        total: images in the job. Each call's own total takes its place.
        unit: what is counted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} " + f"{unit}/s")
    columns = (BarColumn(), MofNCompleteColumn(), rate, TextColumn("ETA"), TimeRemainingColumn())
    start, before = time.perf_counter(), None
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate=0.0)

        def advance(done: int, total: int) -> None:
            nonlocal before
            before = done if before is None else before
            seconds = max(time.perf_counter() - start, 1e-9)
            bar.update(task, completed=done, total=total, rate=(done - before) / seconds)

        yield advance


def duration(seconds: float) -> str:
    """Seconds as minutes or hours."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} hours" if hours else f"{rest // 60}:{rest % 60:02d} minutes"
