"""Attempt notes in OUT: records of shards that were started and not finished, because a process may die at any time.

`.attempt-00007.json` exists while shard 7 is made, and after a failed attempt. A shard that failed too often is made in
pieces: a piece that fails is halved until one image is left, and the row of that image gets the error.

A scheduler may kill a run at any image, and the model may be fixed between runs. So a run ignores failures of earlier
runs, unless very many runs ended at the same shard.
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

from attnx.files import open_regular, replacing
from attnx.limits import RUN_BYTES

__all__ = ["DIED", "Attempt", "forget_attempts", "noted"]

DIED = "the process of the model died at this image"
_DEATHS = 2  # deaths of a process with one image before the image is blamed; one death may have another cause
_EXCUSED = 9  # runs that may end at a shard before its failures are kept


@dataclass
class Attempt:
    """The note of a shard.

    Attributes:
        job: identity of the job; a note of another job is ignored.
        begun: number of attempts that were started and not finished.
        under_way: the piece in progress, images start <= i < stop of the shard; None unless it is made in pieces.
        failed: failed pieces: [start, stop, number of failures, reason].
        limit: time limit in seconds at which a piece was found to hang; else None.
        runs: number of runs that ended during an attempt.
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
        """The note of a shard in a folder; a new note if there is none, or if it can't be read.

        died: True if a piece in progress counts as failed because its process died.
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
        """Record the start of an attempt. It counts as failed unless `end` or `withdraw` follows."""
        self.begun += 1
        self._write()

    def begin_piece(self, start: int, stop: int) -> None:
        """Record the next images of the model. If the process dies, one of them is the cause."""
        self.under_way = start, stop
        self._write()

    def end_piece(self) -> None:
        """Record that the piece is done, so that later deaths don't count for it."""
        self.under_way = None
        self._write()

    def fail(self, start: int, stop: int, why: str, limit: float | None = None) -> None:
        """Record that a piece failed."""
        self.under_way = None
        self.limit = limit or self.limit
        known = next((piece for piece in self.failed if piece[:2] == [start, stop]), None)
        if known is None:
            known = [start, stop, 0, why]
            self.failed.append(known)
        known[2:] = [known[2] + 1, why]
        self._write()

    def why_not(self, start: int, stop: int) -> str | None:
        """The reason if a piece must not run as a whole, because it or a part of it failed before; else None."""
        for first, last, count, why in self.failed:
            if stop - start == 1 and (first, last) == (start, stop) and (why != DIED or count >= _DEATHS):
                return str(why)
            if stop - start > 1 and start <= first and last <= stop:
                return str(why)
        return None

    def withdraw(self) -> None:
        """Undo `begin`, if the attempt was ended on purpose."""
        self.begun -= 1
        self.under_way = None
        if self.begun <= 0 and not self.failed:
            self.end()
        else:
            self._write()

    def excuse(self) -> None:
        """Discard the failures of earlier runs, unless very many runs ended at this shard. Called when a run starts.

        A note without an attempt, or of another job, is removed.
        """
        self.runs += self.begun > 0
        if self.runs <= _EXCUSED:
            self.under_way, self.failed = None, []
        if self.begun > 0:
            self._write()
        else:
            self.end()

    def acquit(self) -> None:
        """Discard the failures because the model is broken, not an image. Call `withdraw` afterwards."""
        self.begun, self.failed = 1, []

    def end(self) -> None:
        """Remove the note when the shard is finished."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        note = {name: value for name, value in asdict(self).items() if name not in ("path", "shard")}
        # Without the note, the search for a bad image only takes longer.
        with self._lock, contextlib.suppress(OSError), replacing(self.path, sync=False) as temporary:
            temporary.write_text(json.dumps(note), encoding="utf-8")


def noted(out: Path) -> dict[int, Path]:
    """The paths of the notes in a folder by shard number."""
    matches = ((re.match(r"\.attempt-(\d+)\.json$", path.name), path) for path in out.glob(".attempt-*.json"))
    return {int(number[1]): path for number, path in matches if number is not None}


def forget_attempts(out: Path, shards: Iterable[int] | None = None) -> None:
    """Remove the notes of these finished shards, or of all. A kill may leave the note of a finished shard."""
    done = None if shards is None else set(shards)
    for shard, path in noted(out).items():
        if done is None or shard in done:
            path.unlink(missing_ok=True)
