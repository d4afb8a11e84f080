"""The cores and the memory of this machine, and what of them decoders may take."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

__all__ = [
    "BYTES_PER_PIXEL",
    "MOST_PIXELS",
    "decoder_bytes",
    "default_max_pixels",
    "default_workers",
    "limit_memory",
    "usable_cores",
    "usable_memory",
]

# Most formats take 8 while they are decoded, WebP takes 16, JPEG 2000 takes 20. JPEG 2000 with alpha takes 25: near
# max_pixels it is an error.
BYTES_PER_PIXEL = 20

_SLACK = 2**29  # bytes: libraries that are imported with the first picture, rows of a table, what malloc keeps
_SLACK_OF_PROCESSORS = 2**32  # bytes: transformers and torch are imported, too
_STACKS = 2**24  # bytes a core: decoders of AVIF start threads
MOST_PIXELS, _FEWEST_PIXELS = 178_956_970, 2**24  # of the default; the first is Pillow's own limit
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def limit_memory(max_pixels: int, processor: bool) -> None:
    """From now on this process gets a MemoryError if it takes more than one picture needs, on Linux.

    processor: Hugging Face's image processors are used.
    """
    if sys.platform != "linux":
        return
    import resource

    slack = _SLACK_OF_PROCESSORS if processor else _SLACK
    more = decoder_bytes(max_pixels) + slack + _STACKS * usable_cores()
    # For each picture anew: what a library leaks in a million pictures is not the fault of the next one.
    has = int((_PROC / "self" / "statm").read_text().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = has + more if hard == resource.RLIM_INFINITY else min(has + more, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def decoder_bytes(max_pixels: int) -> int:
    """The most memory that a decoder takes for one picture, beyond what it has when it starts."""
    return BYTES_PER_PIXEL * max_pixels


def default_max_pixels(decoders: int) -> int:
    """`max_pixels` with which so many decoders take at most half of the memory; at least 2**24."""
    share = usable_memory() // 2 // max(1, decoders) // BYTES_PER_PIXEL
    return max(_FEWEST_PIXELS, min(MOST_PIXELS, share // 10**6 * 10**6))


def usable_memory() -> int:
    """The bytes that this process may use: a container or a job scheduler may allow less than the machine has."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [2**33]
    with contextlib.suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            folder, name = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
            # A group is bound by those that it lies in; a container may see its own group as the root.
            inner = Path(group.strip("/"))
            for path in (inner, *inner.parents):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((folder / path / name).read_text()))
    return min(limits)


def default_workers() -> int:
    """Processes that decode, unless so many are asked for."""
    return min(16, usable_cores())


def usable_cores() -> int:
    """The cores that this process may use: a container or a job scheduler may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
