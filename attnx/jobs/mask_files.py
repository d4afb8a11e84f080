"""Masks of a job's photos as PNG files, for `attnx masks`."""

from __future__ import annotations

import errno
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnx.files import open_regular, replacing
from attnx.images import large_images, upright_size
from attnx.jobs.columns import MapRow
from attnx.jobs.job import Job
from attnx.jobs.mask_images import mask_image
from attnx.jobs.photos import path_of_key, photo_below
from attnx.jobs.pool import in_processes
from attnx.jobs.reader import Maps
from attnx.jobs.runfile import RUN
from attnx.jobs.shards import DamagedError
from attnx.limits import PICTURE_PIXELS

__all__ = ["KINDS", "SETTINGS", "MaskReport", "Masks", "write_masks"]

KINDS = ("heat", "mass")
SETTINGS = "masks.json"


@dataclass
class MaskReport:
    """The result of `write_masks`.

    Attributes:
        made, kept: number of masks that were written, and that were there before.
        without: number of rows without a map.
        errors: (key, reason) of the rows whose mask could not be written.
    """

    made: int = 0
    kept: int = 0
    without: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: MaskReport) -> None:
        """Add the numbers and errors of another report."""
        self.made += other.made
        self.kept += other.kept
        self.without += other.without
        self.errors += other.errors


class Share(NamedTuple):
    """Every `step`-th row of a shard, from row `first` on."""

    shard: int
    first: int
    step: int


@dataclass(frozen=True)
class Masks:
    """The masks to write. The object can be pickled.

    Attributes:
        maps: the maps of the job.
        out: folder of the masks.
        kind: "heat" or "mass".
        mass: the share of a map's mass inside a mask of kind "mass".
        root: folder of the photos, whose sizes are then checked.
        full_names: the mask of a/b.jpg is a/b.jpg.png; False: a/b.png.
    """

    maps: Maps
    out: Path
    kind: str = "heat"
    mass: float = 0.6
    root: Path | None = None
    full_names: bool = False

    def name_of(self, key: Path) -> Path:
        """The path of a mask below the folder, from that of its photo."""
        return key.with_name(f"{key.name}.png") if self.full_names else key.with_suffix(".png")

    def settings(self) -> dict[str, Any]:
        """The settings of the masks and the identity of their job, for JSON."""
        job = Job(self.maps.folder).manifest_sha256 if (self.maps.folder / RUN).is_file() else None
        settings = self.maps.settings
        text = json.dumps([job, settings], sort_keys=True)
        return {
            "kind": self.kind, "mass": self.mass if self.kind == "mass" else None, "model": settings.get("model"),
            "method": settings.get("method"), "full_names": self.full_names,
            "job": hashlib.sha256(text.encode()).hexdigest(),
        }  # fmt: skip

    def write_share(self, share: Share, stopped: Callable[[], bool] = lambda: False) -> MaskReport:
        """Write the masks of a share of the rows that are not there. Maps are read only if one is missing."""
        if (kept := self._all_kept(share)) is not None:
            return kept
        report = MaskReport()
        for row in self._rows(share):
            if stopped():
                return report
            try:
                self._write(row, report)
            # A name that is too long, a folder where the mask belongs, a photo that can't be read.
            except (ValueError, OSError) as error:
                if _is_fatal(error):
                    raise
                report.errors.append((row.key, str(error)))
        return report

    def _rows(self, share: Share, errors_only: bool = False) -> Iterator[MapRow]:
        """The rows of a share. With `errors_only`, maps are not read."""
        return islice(chain.from_iterable(self.maps.groups_of(share.shard, errors_only)), share.first, None, share.step)

    def _all_kept(self, share: Share) -> MaskReport | None:
        """The report of a share whose masks are all there; None if one is missing. No map is read."""
        report = MaskReport()
        for row in self._rows(share, errors_only=True):
            try:
                if row.error is None and not self._target(row.key).is_file():
                    return None
            # The key's error belongs to the report, which `_write` makes then.
            except (ValueError, OSError):
                return None
            report.kept += row.error is None
            report.without += row.error is not None
        return report

    def _target(self, key: str) -> Path:
        """The file of a key's mask. Raises ValueError if the key leaves the folder."""
        if (path := path_of_key(key)) is None:
            raise ValueError(f"expected a key that is a path below {self.out}")
        return self.out / self.name_of(path)

    def _write(self, row: MapRow, report: MaskReport) -> None:
        if row.map is None:
            report.without += 1
            return
        target = self._target(row.key)
        if target.is_file():
            report.kept += 1
            return
        if self.root is not None and (size := _size_of(photo_below(self.root, row.key))) != (row.width, row.height):
            raise ValueError(f"expected a photo of {row.width} x {row.height} pixels; got {size[0]} x {size[1]}")
        mask = mask_image(row, self.kind, self.mass)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A mask that a power failure has emptied would be kept as it is.
        with replacing(target) as unfinished:
            mask.save(unfinished, "PNG")
        report.made += 1


def _size_of(photo: Path) -> tuple[int, int]:
    with large_images(PICTURE_PIXELS):
        return upright_size(photo, PICTURE_PIXELS)


def _is_fatal(error: Exception) -> bool:
    """True for an error of the disk or of the job, not of one row: unlike in a run, a missing photo is one row's."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE)
    return isinstance(error, DamagedError) or (isinstance(error, OSError) and error.errno in full)


def write_masks(masks: Masks, workers: int, progress: Callable[[int, int], None] | None = None) -> MaskReport:
    """Write the masks of all rows, in several processes.

    Files that are there are kept. The settings are stored in masks.json.

    Args:
        masks: what to write.
        workers: number of processes; 0: in this process.
        progress: called with the rows done and their number.

    Raises:
        ValueError: the job has no maps of images over patches; two keys have the same mask; the folder has masks of
            other settings, or other files.
    """
    maps, report, done = masks.maps, MaskReport(), 0
    _check_job(maps)
    _check_names(masks)
    _prepare(masks)
    workers = min(workers, len(maps))
    for part in in_processes(masks.write_share, _shares(masks, workers), workers):
        report.add(part)
        done += part.made + part.kept + part.without + len(part.errors)
        if progress is not None:
            progress(done, len(maps))
    return report


def _check_job(maps: Maps) -> None:
    settings = maps.settings
    found = {"stats": "statistics of heads", "vocab": "maps of words"}
    kind = next((what for name, what in found.items() if name in settings), None)
    kind = "whole maps" if settings.get("store") == "full" else kind
    if kind is not None:
        raise ValueError(f"masks: expected a job with maps of images over patches; {maps.folder} has {kind}")


def _names(masks: Masks) -> Iterator[tuple[str, str]]:
    """(key, name of its mask) of the rows with a map whose key is a path below a folder."""
    for table in masks.maps.tables(["key", "error"]):
        for key, error in zip(table.column("key").to_pylist(), table.column("error").to_pylist(), strict=True):
            if error is None and (path := path_of_key(key)) is not None:
                yield key, masks.name_of(path).as_posix()


def _check_names(masks: Masks) -> None:
    """Raise ValueError if two keys have the same mask. Takes 8 bytes per row."""
    seen = np.sort(np.frombuffer(array("q", (hash(name) for _, name in _names(masks))), np.int64))
    repeated = set(seen[1:][seen[1:] == seen[:-1]].tolist())
    first: dict[str, str] = {}
    for key, name in _names(masks) if repeated else ():
        if hash(name) in repeated and (other := first.setdefault(name, key)) != key:
            got = f"{other!r:.90} and {key!r:.90} have the same"
            raise ValueError(f"masks: expected keys with different masks; {got}; full_names=True names them apart")


def _prepare(masks: Masks) -> None:
    """Create the folder and its masks.json, or check that it has these settings."""
    out, wanted = masks.out, masks.settings()
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.is_file():
        try:
            with open_regular(path) as file:
                there = json.loads(file.read(2**20))
        except ValueError as error:
            raise ValueError(f"out: {path} is not a file of attnx masks: {error}") from error
        there = there if isinstance(there, dict) else {}
        changed = [f"{name}: {there.get(name)!r:.40} there, {wanted[name]!r:.40} now" for name in wanted
                   if there.get(name) != wanted[name]]  # fmt: skip
        if changed:
            raise ValueError(f"out: {out} has masks of other settings ({'; '.join(changed)}); choose another folder")
        return
    other = next((each.name for each in out.iterdir() if not each.name.startswith(".masks-")), None)
    if other is not None:
        raise ValueError(f"out: expected a new folder, or one of attnx masks; {out} has other files, such as {other!r}")
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def _shares(masks: Masks, workers: int) -> list[Share]:
    # A process reads all rows of a shard for its share of them, so shards are split only if they are few.
    step = max(1, -(-workers // masks.maps.shards))
    return [Share(shard, first, step) for shard in range(masks.maps.shards) for first in range(step)]
