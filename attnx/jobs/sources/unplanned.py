"""Counts rows that were added to a source after its job was planned."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from attnx.jobs.sources import Source

if TYPE_CHECKING:
    from attnx.jobs.job import Job

__all__ = ["unplanned"]


def unplanned(source: Source, job: Job) -> list[str]:
    """A message if rows were added to a folder or a table since the job was planned, else an empty list.

    Tars and data sets are not checked because listing them is slow. A missing source is not checked either.
    """
    if source.kind not in ("folder", "table"):
        return []
    known = np.sort(np.frombuffer(array("q", (hash(key) for keys in job.manifest.key_groups() for key in keys)), "q"))
    count, example = 0, ""
    try:
        for entry in source.entries():
            key_hash = hash(entry.key)
            index = int(np.searchsorted(known, key_hash))
            if index == len(known) or known[index] != key_hash:
                count, example = count + 1, example or entry.key
    except (OSError, ValueError):
        return []
    if not count:
        return []
    message = f"{count} rows were added to the source after the job was planned, and are not in it"
    return [f"{message}, such as {example[:160]}; choose another --out to include them"]
