"""Counts what is in a source and not in the job that was planned of it."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from attnx.jobs.sources import Source

if TYPE_CHECKING:
    from attnx.jobs.job import Job

__all__ = ["unplanned"]


def unplanned(source: Source, job: Job) -> list[str]:
    """A line that tells of rows that were added to a folder or a table since the job was planned; else none.

    Tars and data sets are skipped, because listing them is slow; so is a source that is gone.
    """
    if source.kind not in ("folder", "table"):
        return []
    known = np.sort(np.frombuffer(array("q", (hash(key) for keys in job.manifest.key_groups() for key in keys)), "q"))
    count, example = 0, ""
    try:
        for entry in source.entries():
            of = hash(entry.key)
            at = int(np.searchsorted(known, of))
            if at == len(known) or known[at] != of:
                count, example = count + 1, example or entry.key
    except (OSError, ValueError):
        return []
    if not count:
        return []
    told = f"{count} rows of the source are not in the job, which was planned before they were there"
    return [f"{told}, such as {example[:160]}; another --out takes them in"]
