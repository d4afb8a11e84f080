"""Notes in OUT of shards that were begun and not finished, because a process that dies can't tell.

`.attempt-00007.json` is there while shard 7 is made, and after an attempt that failed. A shard that failed too often is
made in pieces: a piece that fails is halved, until one image is left, whose row then says why.

Whoever kills a whole run, such as a scheduler, says nothing about an image; and after a run the model may be mended. So
a run blames no image for what was noted by those before it, unless very many of them ended at the shard.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnx.files import open_regular
from attnx.limits import RUN_BYTES

__all__ = ["DIED", "Attempt", "forget_attempts", "noted"]

DIED = "the process of the model died at this image"
_DEATHS = 2  # of a process with one image, until the image is blamed: something else may have killed it once
_EXCUSED = 9  # runs that may end at a shard, until that is blamed on an image, too


@dataclass
class Attempt:
    """The note of a shard.

    Attributes:
        begun: how often it was begun and not finished.
        under_way: the piece, images start <= i < stop of the shard, under way; None unless it is made in pieces.
        failed: pieces that failed: [start, stop, how often, why].
        limit: seconds that a piece may take, if a longer one was found to hang.
        runs: how many ended when it was begun and not finished.
        job: which job it is of: a note of another job is none.
    """

    path: Path
    shard: int = 0
    job: str = ""
    begun: int = 0
    under_way: tuple[int, int] | None = None
    failed: list[list[Any]] = field(default_factory=list)
    limit: float | None = None
    runs: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @staticmethod
    def of(out: Path, shard: int, job: str = "", died: bool = True) -> Attempt:
        """The note of a shard in a folder; a new one if there is none that can be read.

        died: whether a piece that is under way failed, because its process died.
        """
        path = out / f".attempt-{shard:05d}.json"
        try:
            with open_regular(path) as file:
                known = json.loads(file.read(RUN_BYTES))
            failed = [[int(start), int(stop), int(count), str(why)] for start, stop, count, why in known["failed"]]
            limit = None if known["limit"] is None else float(known["limit"])
            if known["job"] != job:
                return Attempt(path, shard, job)
            note = Attempt(path, shard, job, int(known["begun"]), None, failed, limit, int(known["runs"]))
            if known["under_way"] is not None:
                start, stop = map(int, known["under_way"])
                note.under_way = start, stop
                if died:
                    note.fail(start, stop, DIED)
            return note
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return Attempt(path, shard, job)

    def begin(self) -> None:
        """Counts an attempt. It fails unless `end` or `withdraw` follows."""
        self.begun += 1
        self._write()

    def begin_piece(self, start: int, stop: int) -> None:
        """Notes which images the model gets next: if the process dies, it was one of them."""
        self.under_way = start, stop
        self._write()

    def end_piece(self) -> None:
        """The model is done with the piece, which no later death is blamed on."""
        self.under_way = None
        self._write()

    def fail(self, start: int, stop: int, why: str, limit: float | None = None) -> None:
        """Notes that a piece failed."""
        self.under_way = None
        self.limit = limit or self.limit
        known = next((piece for piece in self.failed if piece[:2] == [start, stop]), None)
        if known is None:
            known = [start, stop, 0, why]
            self.failed.append(known)
        known[2:] = [known[2] + 1, why]
        self._write()

    def why_not(self, start: int, stop: int) -> str | None:
        """Reason not to run a piece as a whole: it failed before, or a part of it did; else None."""
        for first, last, count, why in self.failed:
            if stop - start == 1 and (first, last) == (start, stop) and (why != DIED or count >= _DEATHS):
                return str(why)
            if stop - start > 1 and start <= first and last <= stop:
                return str(why)
        return None

    def withdraw(self) -> None:
        """Takes back `begin`: we ended the attempt ourselves."""
        self.begun -= 1
        self.under_way = None
        if self.begun <= 0 and not self.failed:
            self.end()
        else:
            self._write()

    def excuse(self) -> None:
        """For a run that begins: no image is blamed for how those before it ended, unless they were very many.

        A note of nothing begun, or of another job, is removed.
        """
        self.runs += self.begun > 0
        if self.runs <= _EXCUSED:
            self.under_way, self.failed = None, []
        if self.begun > 0:
            self._write()
        else:
            self.end()

    def acquit(self) -> None:
        """The model is to blame, and no image. `withdraw` follows."""
        self.begun, self.failed = 1, []

    def end(self) -> None:
        """The shard is there: the note is removed."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        note = {name: value for name, value in asdict(self).items() if name not in ("path", "shard")}
        temporary = self.path.with_name(f".part-{self.shard:05d}-attempt.tmp")
        # A note that can't be written costs no more than a longer search.
        with self._lock, contextlib.suppress(OSError):
            temporary.write_text(json.dumps(note), encoding="utf-8")
            temporary.replace(self.path)


def noted(out: Path) -> dict[int, Path]:
    """The notes in a folder, by shard."""
    found = ((re.match(r"\.attempt-(\d+)\.json$", path.name), path) for path in out.glob(".attempt-*.json"))
    return {int(number[1]): path for number, path in found if number is not None}


def forget_attempts(out: Path, shards: Iterable[int] | None = None) -> None:
    """Removes the notes of shards that are done, or of all: a kill may fall between a shard and the end of its note."""
    done = None if shards is None else set(shards)
    for shard, path in noted(out).items():
        if done is None or shard in done:
            path.unlink(missing_ok=True)
