"""Decoding ahead of the model, within a shard and into the following one."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from attnx.jobs.decoding import Decoders, Picture
from attnx.jobs.sources import Entry

__all__ = ["DecodeAhead", "entry_to_read"]

_BATCHES_AHEAD = 3
_COMPUTES = 0.75  # share of a decoder's time; below that, it mostly waits
_PATIENCE = 5.0  # seconds to wait for one picture


class DecodeAhead:
    """The pictures of a shard in order. Later pictures, also of the following shard, are decoded ahead.

    If `alternate` is True, as for a model on a CPU, the decoders and the model alternate every few batches. The model's
    threads synchronise after every operation, so a decoder on one of their cores slows all of them. If decoding mostly
    waits, which is measured at the start of each shard, both run in parallel.

    Args:
        groups: returns the entries of each image of a shard.
    """

    def __init__(self, decoders: Decoders, batch_size: int, groups: Callable[[int], list[list[Entry]]]) -> None:
        self._decoders, self._batch_size, self._groups = decoders, batch_size, groups
        self._begun: dict[int, _Shard] = {}
        self._alternate = False

    def begin(self, shard: int, following: int | None, alternate: bool) -> list[list[Entry]]:
        """The entries of each image of a shard. `next` then returns the pictures of these images."""
        shards = [number for number in (shard, following) if number is not None]
        self._begun = {number: self._begun.get(number) or self._new(number) for number in shards}
        self._alternate = alternate
        return self._begun[shard].groups

    def drop(self, shard: int) -> None:
        """Drop a shard, so that it can be started again."""
        del self._begun[shard]

    def next(self) -> Picture:
        """The next picture of the current shard."""
        begun = list(self._begun.values())
        if not (self._alternate and begun[0].running):
            running = sum(len(each.running) for each in begun)
            ahead = _BATCHES_AHEAD * self._batch_size + self._decoders.workers - running
            for each in begun:
                while each.waiting and ahead > 0:
                    each.running.append(self._decoders.submit(each.waiting.popleft()))
                    ahead -= 1
            if self._alternate:
                self._alternate = _computes([future for each in begun for future in each.running])
        return begun[0].running.popleft().result()

    def _new(self, shard: int) -> "_Shard":
        groups = self._groups(shard)
        return _Shard(groups, deque(map(entry_to_read, groups)), deque())


class _Shard(NamedTuple):
    """A shard in progress.

    groups: the entries of each image. waiting: one entry per image that is not submitted yet. running: the pictures
    in order.
    """

    groups: list[list[Entry]]
    waiting: deque[Entry]
    running: deque[Future[Picture]]


def entry_to_read(group: list[Entry]) -> Entry:
    """The entry that is used to read the image: the first without an error, else the first."""
    return next((entry for entry in group if entry.error is None), group[0])


def _computes(pictures: list[Future[Picture]]) -> bool:
    """True if decoding these pictures is limited by the CPU. Waits for the pictures."""
    seconds = computing = 0.0
    for future in pictures:
        try:
            picture = future.result(_PATIENCE)
        except TimeoutError:
            return False
        seconds, computing = seconds + picture.seconds, computing + picture.computing
    return computing >= _COMPUTES * seconds
