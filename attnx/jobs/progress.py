"""How far a job is, on a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

__all__ = ["Progress", "progress_bar"]

Progress: TypeAlias = Callable[[int, int], None]


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
            # What an earlier run did is no part of this one's rate.
            before = done if before is None else before
            seconds = max(time.perf_counter() - start, 1e-9)
            bar.update(task, completed=done, total=total, rate=(done - before) / seconds)

        yield advance
