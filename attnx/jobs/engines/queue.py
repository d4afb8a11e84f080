"""The queue of shards of a run. It handles failures, and processes that die."""

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
# Processes that may die at one shard, beyond its tries. It takes 13 to find one image among a thousand.
_DEATHS, _DEATHS_AT_FIRST = 100, 15


class RunError(RuntimeError):
    """An error that ends the run, because neither a retry nor another shard would succeed."""


def is_fatal(error: BaseException | None) -> bool:
    """True if neither a retry nor another shard would succeed, for example because the disk is full."""
    return isinstance(error, RunError) or (isinstance(error, OSError) and error.errno in _FATAL)


def by_the_model(error: BaseException) -> bool:
    """True if the model raised the error, see `blame_the_model`."""
    return _BY_THE_MODEL in getattr(error, "__notes__", ())


def blame_the_model(error: BaseException) -> None:
    """Mark an exception as raised by the model."""
    error.add_note(_BY_THE_MODEL)


def why_of(error: BaseException) -> str:
    """The message of an error, with its type unless it is a RunError."""
    return str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"


class Shards:
    """The shards of a run.

    A shard that fails `tries` times is set aside with the last reason, and the run continues. If the model failed, or
    its process died, the shard is made in pieces instead, see `attnx.jobs.attempts`.

    Args:
        todo: numbers of the shards.
        tries: failures of a shard before it is set aside or made in pieces.
        say: called with messages.
        any_done: True if earlier runs have made shards of this job.

    Raises:
        ValueError: `tries` is less than 1.
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
        """The next shard; None if there is none at the moment."""
        return self._waiting.popleft() if self._waiting else None

    def give_back(self, shards: Sequence[int]) -> None:
        """Return shards that were taken but not started."""
        self._waiting.extendleft(reversed(shards))

    def done(self) -> None:
        """Record that a shard was written."""
        self._any_done = True
        self._in_a_row = 0
        self._left -= 1

    def in_pieces(self, shard: int) -> bool:
        """True if a shard failed so often that it is made in pieces."""
        return self._failures[shard] >= self.tries

    def failed(
        self,
        shard: int | None,
        why: str,
        cause: BaseException | None = None,
        died: bool = False,
        model: bool = False,
    ) -> None:
        """Record that a shard failed. shard: None if a process or an actor failed before it got a shard.

        Args:
            why: the error message.
            cause: the exception.
            died: True if the process of the shard died.
            model: True if the model raised the error.

        Raises:
            RunError: too many failures in a row, so single shards are not the cause.
        """
        pieces = shard is not None and (died or model)
        if not pieces:
            self._in_a_row += 1
        message = f"stopped after {self._in_a_row} failures in a row; the last, of shard {shard}: {why}"
        if self._in_a_row >= self.tries * (4 if self._any_done else 1):
            raise RunError(message) from cause
        if shard is None:
            self.say(f"tried again: {why}")
            return
        self._failures[shard] += 1
        more = (_DEATHS if self._any_done else _DEATHS_AT_FIRST) if died else 1 if model else 0
        if self._failures[shard] < self.tries + more:
            how = "made in pieces" if pieces and self.in_pieces(shard) else "tried again"
            self.say(f"shard {shard} failed and is {how}: {why}")
            # A shard in pieces is retried at once, to find the bad image without other work in between.
            (self._waiting.appendleft if pieces else self._waiting.append)(shard)
            return
        if died and not self._any_done:
            raise RunError(f"no shard was made: {self._failures[shard]} processes died; the last: {why}") from cause
        self.say(f"shard {shard} is set aside after {self._failures[shard]} tries: {why}")
        self.set_aside[shard] = why
        self._left -= 1

    @property
    def finished(self) -> bool:
        """True if every shard is done or set aside."""
        return self._left == 0
