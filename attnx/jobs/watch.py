"""Finds a model that hangs: a batch that takes much longer than the ones before it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attnx.jobs.attempts import Attempt

__all__ = ["Hang", "Watch"]

_TICK = 0.5  # seconds
_FIRST = 600.0  # seconds for a batch while none is known: compilers may run
_TIMES = 20.0  # as long as the longest batch so far


@dataclass
class Hang:
    """A piece of a shard, see `Attempt`, that the model works on. limit, seconds: what it may take, and has taken."""

    attempt: Attempt
    start: int
    stop: int
    limit: float
    seconds: float = 0.0


class Watch:
    """A thread that watches sections; a context manager.

    Args:
        limit: seconds that a section may take; unless given, 20 times as long as the longest so far, but not less than
            `least`. Where none is known, the limit at which the shard failed before, or 600 s.
        first: seconds that the first section may take in any case.
        hang: is called with the section that takes longer; it ends the process. None: nothing is watched.

    Seconds are counted in steps of at most a second, so that a process that was stopped and goes on is not blamed.
    """

    def __init__(
        self, limit: float | None, hang: Callable[[Hang], None] | None, least: float = 10.0, first: float = 0.0
    ) -> None:
        self.limit, self.least, self.first, self._hang = limit, least, first, hang
        self._longest: float | None = None
        self._sections: dict[int, Hang] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="attnx-watch", daemon=True)

    def __enter__(self) -> Watch:
        if self._hang is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @contextlib.contextmanager
    def section(self, attempt: Attempt, start: int, stop: int) -> Iterator[None]:
        """The model runs inside, on images start <= i < stop of a shard."""
        begin = time.perf_counter()
        of = Hang(attempt, start, stop, self._allowed(attempt))
        self._sections[id(of)] = of
        try:
            yield
        finally:
            del self._sections[id(of)]
        self._longest = max(self._longest or 0.0, time.perf_counter() - begin)

    def _allowed(self, attempt: Attempt) -> float:
        if self._longest is None:
            return max(self.first, self.limit or attempt.limit or _FIRST)
        return self.limit or max(self.least, _TIMES * self._longest)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(_TICK):
            now = time.monotonic()
            for section in list(self._sections.values()):
                section.seconds += min(now - last, 2 * _TICK)
                if section.seconds > section.limit and self._hang is not None:
                    self._hang(section)
                    return
            last = now
