"""Detects a model that hangs: a batch that takes much longer than earlier ones."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attnx.jobs.attempts import Attempt

__all__ = ["Hang", "Watch"]

_TICK = 0.5  # seconds
_FIRST = 600.0  # seconds for the first batch, which may include compilation
_TIMES = 20.0  # limit relative to the longest batch so far


@dataclass
class Hang:
    """A watched section: images start <= i < stop of the shard of `attempt`.

    limit: seconds that it may take. seconds: time so far.
    """

    attempt: Attempt
    start: int
    stop: int
    limit: float
    seconds: float = 0.0


class Watch:
    """A thread that limits the time of sections; a context manager.

    Args:
        limit: seconds per section; by default 20 times the longest so far, and at least `least`. For the first
            section, the default is the limit at which the shard failed before, else 600 s.
        hang: called with the section that exceeds its limit. It must end the process. None: nothing is watched.
        least: lower bound of the default limit in seconds.
        first: lower bound of the first section's limit in seconds.

    Time is counted in steps of at most 1 s, so the time in which the process is suspended does not count.
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
        """Watch the model inside the `with`, on images start <= i < stop of a shard."""
        begin = time.perf_counter()
        section = Hang(attempt, start, stop, self._allowed(attempt))
        self._sections[id(section)] = section
        try:
            yield
        finally:
            del self._sections[id(section)]
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
