"""Progress of a job: a bar on a terminal, or lines in a log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

__all__ = ["Log", "Progress", "duration", "progress_bar"]

Progress: TypeAlias = Callable[[int, int], None]


class Log:
    """Lines of progress for a run without a terminal; a context manager.

    Args:
        unit: name of the rows.
        every: seconds between lines; None: no lines.
        say: called with each line.
    """

    def __init__(self, unit: str, every: float | None, say: Callable[[str], None]) -> None:
        self.unit, self.every, self._say = unit, every, say
        self._start = time.monotonic()
        self._before: int | None = None
        self.done = self.total = self.errors = 0
        self._ended = threading.Event()

    def __enter__(self) -> Log:
        if self.every is not None:
            threading.Thread(target=self._log_lines, args=(self.every,), name="attnx-log", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def progress(self, done: int, total: int) -> None:
        """Update the numbers of done and planned rows."""
        # Rows of earlier runs don't count for the rate.
        self._before = done if self._before is None else self._before
        self.done, self.total = done, total

    def line(self) -> str:
        """A line with the rows done and planned, rows/s, the time left, and the number of errors in this run."""
        done, total, unit = self.done, self.total, self.unit
        rate = (done - (self._before or 0)) / max(time.monotonic() - self._start, 1e-9)
        left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
        wrong = f", {self.errors:,} errors" if self.errors else ""
        return f"{done:,} of {total:,} {unit} ({100 * done / max(total, 1):.0f} %), {rate:.1f} {unit}/s{left}{wrong}"

    def _log_lines(self, every: float) -> None:
        while not self._ended.wait(every):
            self._say(self.line() if self.total else "listing the source")


@contextlib.contextmanager
def progress_bar(total: int, unit: str = "images") -> Iterator[Progress]:
    """A progress function that draws a bar with images/s and the time left on stderr, or in a notebook.

    Args:
        total: number of images; each call updates it.
        unit: name of the rows.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=f" {unit}", dynamic_ncols=True) as bar:
        first = True

        def advance(done: int, total: int) -> None:
            nonlocal first
            if first:
                # Rows of earlier runs don't count for the rate.
                bar.initial = bar.n = done
                first = False
            bar.total = total
            bar.update(done - bar.n)
            bar.refresh()

        yield advance


def duration(seconds: float) -> str:
    """A time in seconds as text in minutes or hours."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} hours" if hours else f"{rest // 60}:{rest % 60:02d} minutes"
