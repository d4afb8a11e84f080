"""Which shards are left, when those who make them may die."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

__all__ = ["Shards"]


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
        self._tries, self._say = tries, say
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

    def failed(self, shard: int | None, why: str) -> None:
        """A shard could not be made, or whoever makes them fails before it gets one.

        Raises:
            RuntimeError: so many failures in a row that it can't be the shards.
        """
        self._in_a_row += 1
        if self._in_a_row >= self._tries * (4 if self._any_done else 1):
            raise RuntimeError(f"stopped after {self._in_a_row} failures in a row; the last, of shard {shard}: {why}")
        if shard is None:
            self._say(f"tried again: {why}")
            return
        self._failures[shard] += 1
        if self._failures[shard] < self._tries:
            self._say(f"shard {shard} failed and is tried again: {why}")
            self._waiting.append(shard)
        else:
            self._say(f"shard {shard} is set aside after {self._tries} tries: {why}")
            self.set_aside[shard] = why
            self._left -= 1

    @property
    def finished(self) -> bool:
        """Every shard is done or set aside."""
        return self._left == 0
