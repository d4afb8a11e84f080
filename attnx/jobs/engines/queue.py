"""Which shards are left, when those who make them may die."""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Callable, Sequence

__all__ = ["RunError", "Shards", "blame_the_model", "by_the_model", "is_fatal", "why_of"]

_FATAL = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENOENT, errno.EACCES,
    errno.EPERM, errno.ENOTDIR,
)  # fmt: skip
_BY_THE_MODEL = "raised by the model"
# Of processes with one shard, beyond its tries. To find one image among a thousand takes thirteen.
_DEATHS, _DEATHS_AT_FIRST = 100, 15


class RunError(RuntimeError):
    """The run ends: no other try, and no other shard, would do better."""


def is_fatal(error: BaseException | None) -> bool:
    """True if no other try, and no other shard, would do better: files can't be written or read any more."""
    return isinstance(error, RunError) or (isinstance(error, OSError) and error.errno in _FATAL)


def by_the_model(error: BaseException) -> bool:
    """True if the model raised it, see `blame_the_model`."""
    return _BY_THE_MODEL in getattr(error, "__notes__", ())


def blame_the_model(error: BaseException) -> None:
    """Notes in an exception that the model raised it."""
    error.add_note(_BY_THE_MODEL)


def why_of(error: BaseException) -> str:
    """An error in words."""
    return str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"


class Shards:
    """The shards of a run.

    One that fails `tries` times is set aside with the last reason, and the run goes on. If the model failed, or its
    process died, it is made in pieces instead, by whoever takes it next: see `attnx.jobs.attempts`.

    any_done: whether some shards were made by earlier runs.

    Raises:
        ValueError: fewer than one try.
    """

    def __init__(self, todo: Sequence[int], tries: int, say: Callable[[str], None], any_done: bool = False) -> None:
        if tries < 1:
            raise ValueError(f"tries: expected at least 1, got {tries}")
        self._waiting = deque(todo)
        self._left = len(todo)
        self.tries, self.say = tries, say
        self._failures: Counter[int] = Counter()
        self._any_done = any_done
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

    def in_pieces(self, shard: int) -> bool:
        """True if a shard has failed so often that it is made in pieces."""
        return self._failures[shard] >= self.tries

    def failed(
        self,
        shard: int | None,
        why: str,
        cause: BaseException | None = None,
        died: bool = False,
        model: bool = False,
    ) -> None:
        """A shard could not be made, or whoever makes them fails before it gets one.

        died: the process that made it did; model: it was the model that failed.

        Raises:
            RunError: so many failures in a row that it can't be the shards.
        """
        pieces = shard is not None and (died or model)
        if not pieces:
            self._in_a_row += 1
        told = f"stopped after {self._in_a_row} failures in a row; the last, of shard {shard}: {why}"
        if self._in_a_row >= self.tries * (4 if self._any_done else 1):
            raise RunError(told) from cause
        if shard is None:
            self.say(f"tried again: {why}")
            return
        self._failures[shard] += 1
        more = (_DEATHS if self._any_done else _DEATHS_AT_FIRST) if died else 1 if model else 0
        if self._failures[shard] < self.tries + more:
            how = "made in pieces" if pieces and self.in_pieces(shard) else "tried again"
            self.say(f"shard {shard} failed and is {how}: {why}")
            # In pieces at once: others would only come between it and the image to blame.
            (self._waiting.appendleft if pieces else self._waiting.append)(shard)
            return
        if died and not self._any_done:
            raise RunError(f"no shard was made: {self._failures[shard]} processes died; the last: {why}") from cause
        self.say(f"shard {shard} is set aside after {self._failures[shard]} tries: {why}")
        self.set_aside[shard] = why
        self._left -= 1

    @property
    def finished(self) -> bool:
        """Every shard is done or set aside."""
        return self._left == 0
