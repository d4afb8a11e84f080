"""Work on many items in a pool of processes, which ends with this process and finishes its items after an interrupt."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

__all__ = ["in_processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item, Callable[[], bool]], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """The results of all items, in the order in which they are finished.

    Args:
        work: called with an item and a function that returns True after an error or an interrupt; the item should then
            end soon. It is pickled once for each process.
        items: can be pickled.
        workers: number of processes; 0 or 1: in this process.
    """
    if workers <= 1:
        yield from (work(item, lambda: False) for item in items)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(work, stop))
    try:
        waiting = {pool.submit(_run, item) for item in items}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    finally:
        # After an error or an interrupt, the processes finish what they are writing.
        stop.set()
        pool.shutdown(cancel_futures=True)


_work: tuple[Callable[..., Any], Any] | None = None


def _start(work: Callable[..., Any], stop: Any) -> None:
    """Prepare a process of the pool: one thread, no interrupts, and an end with its parent."""
    global _work
    _work = work, stop
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent, on every system; `supervisor.die_with` needs Linux."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(item: Any) -> Any:
    assert _work is not None
    work, stop = _work
    return work(item, stop.is_set)
