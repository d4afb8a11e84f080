"""Which shards are left, when those who make them may die."""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Callable, Sequence

__all__ = ["Shards", "is_fatal"]

_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_fatal(error: BaseException | None) -> bool:
    """Whether no other try, and no other shard, would do better: the disk is full or can't be written to."""
    return isinstance(error, OSError) and error.errno in _FATAL


class Shards:
    """The shards of a run. One that fails `tries` times is set aside, with the last reason, and the run goes on.

    Raises:
        ValueError: fewer than one try.
    """

    def __init__(self, todo: Sequence[int], tries: int, say: Callable[[str], None]) -> None:
        if tries < 1:
            raise ValueError(f"tries: expected at least 1, got {tries}")
        self._waiting = deque(todo)
        self._left = len(todo)
        self.tries, self.say = tries, say
        self._failures: Counter[int] = Counter()
        self._any_done = False
        self._in_a_row = 0
        self.set_aside: dict[int, str] = {}

    def take(self) -> int | None:
        """A shard to make; None if there is none at the moment."""
        return self._waiting.popleft() if self._waiting else None

    def give_back(self, shards: Sequence[int]) -> None:
        """Shards that were taken and not begun."""
        self._waiting.extendleft(reversed(shards))

    def done(self) -> None:
        """A shard was written."""
        self._any_done = True
        self._in_a_row = 0
        self._left -= 1

    def failed(self, shard: int | None, why: str, cause: BaseException | None = None) -> None:
        """A shard could not be made, or whoever makes them fails before it gets one.

        Raises:
            RuntimeError: so many failures in a row that it can't be the shards.
        """
        self._in_a_row += 1
        if self._in_a_row >= self.tries * (4 if self._any_done else 1):
            told = f"stopped after {self._in_a_row} failures in a row; the last, of shard {shard}: {why}"
            raise RuntimeError(told) from cause
        if shard is None:
            self.say(f"tried again: {why}")
            return
        self._failures[shard] += 1
        if self._failures[shard] < self.tries:
            self.say(f"shard {shard} failed and is tried again: {why}")
            self._waiting.append(shard)
        else:
            self.say(f"shard {shard} is set aside after {self.tries} tries: {why}")
            self.set_aside[shard] = why
            self._left -= 1

    @property
    def finished(self) -> bool:
        """Every shard is done or set aside."""
        return self._left == 0
