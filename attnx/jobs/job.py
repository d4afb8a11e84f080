"""A job in a folder: a fixed plan and the finished shards. A job that was killed continues when it is run again.

- `manifest.parquet`: all rows in order.
- `run.json`: the settings that determine the maps.
- `part-00007.parquet`: shard 7, a slice of the manifest. If the file exists, it is complete.
- `.lock`: held by the run that writes, or shared by the ranks of one world.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnx.jobs.attempts import Attempt, noted
from attnx.jobs.locks import Lock
from attnx.jobs.manifest import Manifest
from attnx.jobs.runfile import read_run
from attnx.jobs.shards import Part, part_name, parts
from attnx.jobs.sources import Entry

__all__ = ["MANIFEST", "Job", "Rank", "check_same", "differences"]

MANIFEST = "manifest.parquet"


class Job:
    """A planned job.

    Attributes:
        rows: number of rows in the manifest.
        shard_size: rows per shard.
        shards: number of shards.
        manifest_sha256: SHA-256 of the manifest's file.
        lock: the lock of the folder; None for readers.
        planned_now: True if this run made the plan.

    Raises:
        FileNotFoundError: the folder has no run.json.
        DamagedError: run.json or the manifest is damaged.
        ValueError: a newer attnx wrote the folder.
    """

    lock: Lock | None = None
    planned_now = False

    def __init__(self, out: Path) -> None:
        self.out = out
        self.run: dict[str, Any] = read_run(out)
        self.manifest_sha256: str = self.run["manifest_sha256"]
        self.rows: int = self.run["rows"]
        self.shard_size: int = self.run["shard_size"]
        self.shards = -(-self.rows // self.shard_size)
        self.manifest = Manifest(out / MANIFEST, self.manifest_sha256, self.rows)

    def entries(self, shard: int) -> list[Entry]:
        """The rows of a shard."""
        return self.manifest.entries(shard * self.shard_size, (shard + 1) * self.shard_size)

    def entry(self, row: int) -> Entry:
        """One row of the manifest."""
        return self.manifest.entries(row, row + 1)[0]

    def rows_of(self, shard: int) -> int:
        """The number of rows of a shard."""
        return min(self.shard_size, self.rows - shard * self.shard_size)

    def part(self, shard: int) -> Path:
        """The file of a shard."""
        return self.out / part_name(shard)

    def place(self, shard: int) -> dict[str, Any]:
        """The shard's number and the manifest's hash. They are written into its file to detect mixed-up files."""
        return {"shard": shard, "manifest": self.manifest_sha256}

    def open_part(self, shard: int) -> Part:
        """A finished shard.

        Raises:
            DamagedError: its file is damaged, or belongs to another shard or job.
        """
        part = Part(self.part(shard))
        part.check_place(shard, self.rows_of(shard), self.manifest_sha256)
        return part

    @property
    def identity(self) -> str:
        """A hash of the manifest, the shard size and the settings. It differs between different jobs."""
        content = json.dumps([self.manifest_sha256, self.shard_size, self.run["settings"]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def attempt(self, shard: int, died: bool = True) -> Attempt:
        """The attempt note of a shard, see `Attempt.of`."""
        return Attempt.of(self.out, shard, self.identity, died)

    def excuse_attempts(self, rank: Rank | None = None) -> None:
        """Excuse the notes of a rank's shards, or of all shards. See `Attempt.excuse`."""
        for shard in noted(self.out):
            if rank is None or shard % rank.world == rank.rank:
                self.attempt(shard, died=False).excuse()

    def check_plan(self) -> None:
        """Check that the folder still holds this job. Without working locks, another run may have replaced it.

        Raises:
            ValueError: the folder holds another job.
            OSError: the folder is gone.
        """
        if self.lock is not None:
            self.lock.check()
        now = read_run(self.out)
        if any(now[name] != self.run[name] for name in ("manifest_sha256", "shard_size", "settings")):
            raise ValueError(f"out: another run replaced the job in {self.out}; choose another folder for one of them")

    def done(self) -> set[int]:
        """The numbers of the finished shards."""
        names = {path.name for path in parts(self.out)}
        return {shard for shard in range(self.shards) if self.part(shard).name in names}

    def remove_temporaries(self, rank: Rank | None = None) -> None:
        """Remove temporary files that a kill left, of a rank's shards or of all.

        No other process writes them, because this run holds the lock.
        """
        for path in (*self.out.glob(".part-*.tmp"), *self.out.glob(".attempt-*.tmp")):
            number = re.match(r"\.(?:part|attempt)-(\d+)-", path.name)
            if rank is None or (number is not None and int(number[1]) % rank.world == rank.rank):
                path.unlink(missing_ok=True)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raise ValueError if these settings differ from the job's. The message lists the differences."""
        check_same(self, {"settings": settings})

    def errors(self, shard: int) -> int:
        """The number of rows with an error in a finished shard."""
        return self.open_part(shard).errors


@dataclass(frozen=True)
class Rank:
    """One of `world` runs that share a job. It makes the shards whose number modulo `world` is `rank`."""

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank: expected 0 <= rank < world; got rank {self.rank} of a world of {self.world}")


def check_same(job: Job, wanted: dict[str, Any]) -> None:
    """Raise ValueError if `wanted` differs from the job's run.json. The message lists the differences."""
    if found := differences(job, wanted):
        message = "; ".join(found)
        raise ValueError(f"out: {job.out} holds a job with other settings. {message}. Choose another folder")


def differences(job: Job, wanted: dict[str, Any]) -> list[str]:
    """The differences between `wanted` and the job's run.json, as text."""
    new = _flat(json.loads(json.dumps(wanted)))
    old = _flat({name: job.run.get(name) for name in wanted})
    return [
        f"{name.removeprefix('settings.')}: {old.get(name)!r} in the job, {new.get(name)!r} now"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one flat dict with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}
